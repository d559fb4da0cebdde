# The lab in one step:
#   docker build -t tformer-lab .
#   docker run --rm -p 8888:8888 tformer-lab            then open the address that it prints
#
# With an NVIDIA GPU (driver and NVIDIA Container Toolkit on the host), the CUDA compiler and PyTorch's CUDA wheels:
#   docker build -t tformer-lab-gpu --build-arg BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04 --build-arg TORCH= .
#   docker run --rm --gpus all -p 8888:8888 tformer-lab-gpu
ARG BASE=ubuntu:24.04
FROM ${BASE}

# PyTorch's CPU wheels are a tenth of the size. Empty for the CUDA ones.
ARG TORCH=cpu

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      build-essential ca-certificates git make npm python3 python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

# The image's own user stands on id 1000, which an editor that mounts your checkout expects of the container's user.
RUN if id ubuntu; then userdel ubuntu; fi \
 && useradd --create-home --uid 1000 learner \
 && install --directory --owner=learner --group=learner /home/learner/course
USER learner
WORKDIR /home/learner/course

# Everything is installed before the course is copied, so that a change of the course does not install PyTorch again. The
# install is editable: an empty package stands in for the one that is copied over it.
COPY --chown=learner:learner pyproject.toml Makefile README.md LICENSE ./
RUN mkdir tformer_lib kernels && touch tformer_lib/__init__.py && PIP_NO_CACHE_DIR=1 make setup TORCH=${TORCH}
COPY --chown=learner:learner . .

EXPOSE 8888
CMD [".venv/bin/jupyter", "lab", "--ip=0.0.0.0", "--port=8888", "--no-browser"]
