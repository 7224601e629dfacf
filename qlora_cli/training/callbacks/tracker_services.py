"""The web services of trackers: whether one can be reached without a prompt, and how a record is sent there later."""

import configparser
import netrc
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from qlora_cli.settings.choices import ReportTo

REACH_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Service:
    """The service of a tracker.

    Attributes:
        title: Its name.
        address: Its address, unless the variable `address_variable` has another.
        keys: Variables that hold a login.
        stores_login: Whether a login for a host is stored on this machine.
        login: How to log in.
        mode: The variable that decides whether a run is sent, and its value for one that is only recorded.
        sends: The values of that variable with which a run is sent.
        folder: The variable that names the folder of what is recorded.
        upload: How a record is sent later, with that folder to fill in.
    """

    title: str
    address: str
    address_variable: str
    keys: tuple[str, ...]
    stores_login: Callable[[str], bool]
    login: str
    mode: tuple[str, str]
    sends: tuple[str, ...]
    folder: str
    upload: str

    def offline_reason(self) -> str | None:
        """Return why the service can't be used; None if it can, or if the user has decided."""
        if os.environ.get(self.mode[0]) not in {None, "", *self.sends}:
            return None
        address = os.environ.get(self.address_variable) or self.address
        host = urlsplit(address).netloc
        if not any(os.environ.get(key) for key in self.keys) and not self.stores_login(host):
            return f"there is no login for {host} ({self.login}, or {self.keys[0]})"
        return None if _is_reachable(address) else f"{host} can't be reached"


def _is_reachable(address: str) -> bool:
    """Return whether a server answers, or is behind a proxy, which prevents the check."""
    parts = urlsplit(address)
    if parts.scheme in getproxies():
        return True
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        with socket.create_connection((parts.hostname or "", port), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False


def _wandb_login(host: str) -> bool:
    """Return whether `wandb login` has stored a key."""
    stored = (Path(os.environ.get("NETRC") or "~/.netrc"), Path("~/_netrc"))
    path = next((path.expanduser() for path in stored if path.expanduser().exists()), None)
    return path is not None and not {host, "default"}.isdisjoint(_hosts_in(path))


def _swanlab_login(_: str) -> bool:
    """Return whether `swanlab login` has stored a key, under the name of whichever host it is for."""
    folder = Path(os.environ.get("SWANLAB_SAVE_DIR") or "~/.swanlab").expanduser()
    return bool(_hosts_in(folder / ".netrc"))


def _hosts_in(path: Path) -> set[str]:
    try:
        return set(netrc.netrc(path).hosts)
    except (OSError, netrc.NetrcParseError):
        return set()


def _comet_login(_: str) -> bool:
    """Return whether `comet login` has stored a key."""
    paths = [Path(os.environ.get("COMET_CONFIG") or "~/.comet.config").expanduser(), Path(".comet.config")]
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(paths, encoding="utf-8")
    except (OSError, ValueError, configparser.Error):
        return False
    return bool(parser.get("comet", "api_key", fallback=""))


SERVICES = {
    ReportTo.WANDB: Service(
        title="Weights & Biases",
        address="https://api.wandb.ai",
        address_variable="WANDB_BASE_URL",
        keys=("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"),
        stores_login=_wandb_login,
        login="wandb login",
        mode=("WANDB_MODE", "offline"),
        sends=("online",),
        folder="WANDB_DIR",
        upload="wandb sync {folder}/wandb/offline-run-*",
    ),
    ReportTo.COMET: Service(
        title="Comet",
        address="https://www.comet.com",
        address_variable="COMET_URL_OVERRIDE",
        keys=("COMET_API_KEY",),
        stores_login=_comet_login,
        login="comet login",
        mode=("COMET_START_ONLINE", "0"),
        sends=("1", "true", "True"),
        folder="COMET_OFFLINE_DIRECTORY",
        upload="comet upload {folder}/*.zip",
    ),
    ReportTo.SWANLAB: Service(
        title="SwanLab",
        address="https://api.swanlab.cn",
        address_variable="SWANLAB_API_HOST",
        keys=("SWANLAB_API_KEY",),
        stores_login=_swanlab_login,
        login="swanlab login",
        mode=("SWANLAB_MODE", "offline"),
        sends=("cloud",),
        folder="SWANLAB_LOG_DIR",
        upload="swanlab sync {folder}/run-*",
    ),
}
