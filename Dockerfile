# octvideo, with FFmpeg, for a CPU or for CUDA.
#
#   docker build -t octvideo .                                                                            a CPU
#   docker build -t octvideo:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .       CUDA 12.8
#   docker run --rm -v "$PWD/data:/work/data" -v "$PWD/runs:/work/runs" octvideo train --cfg quickstart
#   docker run --rm -p 127.0.0.1:8080:8080 -v "$PWD/runs:/work/runs:ro" octvideo \
#       serve --ckpt runs/quickstart/checkpoints/last.ckpt --host 0.0.0.0
#
# torch's wheels bring CUDA's libraries: the machine needs its driver and the NVIDIA Container Toolkit (--gpus all).
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=export,hub,s3,serve,torchcodec,tune
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# torch first, which changes less often than the rest: this layer is kept.
# hadolint ignore=DL3013
RUN pip install --index-url "$TORCH_INDEX" torch torchvision
COPY pyproject.toml setup.py README.md LICENSE /source/
COPY octvideo /source/octvideo
COPY configs /source/configs
# hadolint ignore=DL3013
RUN pip install "/source[$EXTRAS]"

FROM python:${PYTHON}-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ffmpeg \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 octvideo \
    && mkdir -p /work/data /work/runs \
    && chown -R octvideo /work
COPY --from=build /opt/venv /opt/venv
COPY --chown=octvideo tools /work/tools
COPY --chown=octvideo configs /work/configs
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
USER 1000
WORKDIR /work
EXPOSE 8080 7860
ENTRYPOINT ["octvideo"]
CMD ["--help"]
