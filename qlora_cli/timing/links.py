"""What GPUs send each other weights and gradients over, and how fast. Nothing here was measured by us.

The rates are those of a ring, in bytes a second that each GPU receives while it sends as many. Imports no torch.
"""

# PCI Express 4.0 carries 31.5 GB/s each way with 16 lanes (its specification). GeForce cards send through the memory
# of the host, one after another (a guess).
# NVLink of an A100 carries 300 GB/s each way, of an H100 450 (their data sheets); of that, two thirds (a guess).
# InfiniBand and Ethernet are those of one card each, of 400 and 25 Gbit/s, with four fifths of that (a guess).
RATES = {"pcie": 10e9, "nvlink": 200e9, "infiniband": 40e9, "ethernet": 2.5e9}


def exchange_seconds(num_bytes: int, num_processes: int, link: str) -> float:
    """Return the seconds in which each of several processes learns the sum of their gradients.

    A ring passes each byte on twice, but for the share that a process has already.
    """
    return 2 * (num_processes - 1) / num_processes * num_bytes / RATES[link]


def gather_seconds(received_bytes: int, link: str) -> float:
    """Return the seconds in which a process receives weights that the others hold."""
    return received_bytes / RATES[link]
