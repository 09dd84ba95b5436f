# The package in the environment of its tests, with the versions in constraints.txt.
#
#   docker build -t trl-diffusion-sdpo .
#   docker run --rm trl-diffusion-sdpo env
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -w /work trl-diffusion-sdpo \
#       train --config sd15_lora --dataset_name pairs --output_dir sd15-lora
#   docker run --rm --entrypoint make trl-diffusion-sdpo test
#
# CUDA comes with PyPI's torch. Your host needs a driver and NVIDIA's container toolkit.
FROM python:3.11-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1
WORKDIR /opt/trl-diffusion-sdpo
COPY . .
RUN make .venv/installed-dev

ENV PATH=/opt/trl-diffusion-sdpo/.venv/bin:$PATH
ENTRYPOINT ["trl-diffusion-sdpo"]
CMD ["--help"]
