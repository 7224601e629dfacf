# syntax=docker/dockerfile:1
# How it is built and used: docs/how-to/docker.md. A test checks each instruction against the project.

ARG BASE=nvidia/cuda:13.0.2-base-ubuntu24.04
FROM ${BASE}

# A compiler and Python's headers, because Triton compiles kernels when they are first used.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

# Downloads and what is compiled or measured survive a container in the volume; any user may write to it.
ENV HF_HOME=/cache/huggingface \
    QLORA_CACHE=/cache/qlora \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    MPLCONFIGDIR=/cache/matplotlib \
    PATH=/opt/qlora/bin:${PATH}
RUN mkdir /cache && chmod 1777 /cache
VOLUME /cache

# PyTorch and the rest, whose layer stays while only the source changes.
WORKDIR /opt/source
ARG EXTRAS=tensorboard
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY qlora_cli ./qlora_cli
RUN python3 -m venv /opt/qlora \
 && pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]"

RUN useradd --create-home qlora && mkdir /work && chown qlora /work
USER qlora
WORKDIR /work
ENTRYPOINT ["qlora"]
CMD ["doctor"]
