# oreal-jax in a container, for TPU VMs and for NVIDIA GPUs. EXTRA is the extra of
# pyproject.toml to install: tpu, cuda12 or cuda13.
#
#   docker build --build-arg EXTRA=tpu -t oreal-jax .
#   docker run --rm --privileged --net=host -v /shared:/shared -e OREAL_PROCESSES=auto \
#     oreal-jax train configs/oreal_7b.py --set model=DIR --run /shared/runs/oreal7b
#
#   docker build --build-arg EXTRA=cuda13 -t oreal-jax .
#   docker run --rm --gpus=all --ipc=host -v /shared:/shared \
#     oreal-jax train configs/oreal_7b.py --set model=DIR --run /shared/runs/oreal7b
#
# Compiled programs stay in ~/.cache/oreal_jax of the container; mount it to keep them.
FROM python:3.12-slim

ARG EXTRA=tpu
WORKDIR /oreal-jax
COPY pyproject.toml README.md LICENSE ./
COPY oreal_jax oreal_jax
RUN pip install --no-cache-dir ".[${EXTRA}]"
COPY configs configs
COPY tools tools

ENTRYPOINT ["oreal"]
CMD ["--help"]
