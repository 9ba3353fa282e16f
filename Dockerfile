# Serving image: the server and its model code, without root.
#   docker build -t ladimo .                                  for CPUs
#   docker build -t ladimo:cuda --build-arg DEVICE=cuda .     for GPUs
#   docker run -p 8000:8000 -v /path/to/MODEL:/model:ro ladimo --policy balanced
# Flags of ladimo-server follow the image's name. Set the port by LADIMO_PORT, which the health check reads.
ARG DEVICE=cpu

FROM python:3.12-slim AS requirements
WORKDIR /src
COPY pyproject.toml ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print(*p['dependencies'], *p['optional-dependencies']['otel'], sep='\n')" > requirements.txt

FROM python:3.12-slim AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/ladimo
ENV PATH=/opt/ladimo/bin:$PATH
WORKDIR /src
# The dependencies come first, so that they are installed again only when they change. PyPI's torch for Linux is the CUDA build;
# that for CPUs has its own index. An empty CPU_TORCH takes torch from pip's own index.
ARG DEVICE
ARG CPU_TORCH=https://download.pytorch.org/whl/cpu
COPY --from=requirements /src/requirements.txt ./
RUN if [ "$DEVICE" = cpu ] && [ -n "$CPU_TORCH" ]; then grep '^torch' requirements.txt > torch.txt && pip install --no-cache-dir --index-url "$CPU_TORCH" -r torch.txt; fi
RUN pip install --no-cache-dir -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY ladimo ladimo
COPY server server
RUN pip install --no-cache-dir --no-deps .
# Compile the CPU step for each kind of processor that may run the image. The server loads the best one that its processor can
# run, and says which. The sources must not be found before the installed package.
WORKDIR /
RUN python -m ladimo.model.cpu

FROM python:3.12-slim AS cpu

FROM python:3.12-slim AS cuda
# Triton compiles the launchers of its kernels where they run.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# hadolint ignore=DL3006
FROM ${DEVICE}
RUN useradd --create-home --uid 10001 ladimo
COPY --from=build /opt/ladimo /opt/ladimo
# The root file system may be read-only, if /tmp is not.
ENV PATH=/opt/ladimo/bin:$PATH \
    HF_HUB_OFFLINE=1 \
    XDG_CACHE_HOME=/tmp/cache \
    TRITON_CACHE_DIR=/tmp/triton \
    LADIMO_MODEL=/model \
    LADIMO_HOST=0.0.0.0 \
    LADIMO_PORT=8000
# A number, so that Kubernetes sees that it is not root.
USER 10001
EXPOSE 8000
HEALTHCHECK --start-period=300s --timeout=10s CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"LADIMO_PORT\"]}/health/live')"]
ENTRYPOINT ["ladimo-server"]
