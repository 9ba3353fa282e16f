# Serving image: the server and its model code, no compiler, no root.
#   docker build -t ladimo .
#   docker run --gpus all -p 8000:8000 -v /path/to/MODEL:/model:ro -e LADIMO_ADMIN_KEY=... ladimo
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY ladimo ladimo
COPY server server
RUN python -m venv /opt/ladimo && /opt/ladimo/bin/pip install --no-cache-dir .
# Compile the CPU step for each kind of processor that may run the image. The server loads the best one that its processor can
# run, and says which. `cd /`, so that the installed package is used and not the one in /src.
RUN cd / && /opt/ladimo/bin/python -m ladimo.model.cpu

FROM python:3.12-slim
RUN useradd --create-home --uid 10001 ladimo
COPY --from=build /opt/ladimo /opt/ladimo
USER ladimo
ENV PATH=/opt/ladimo/bin:$PATH HF_HUB_OFFLINE=1
EXPOSE 8000
HEALTHCHECK --start-period=300s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live')"]
ENTRYPOINT ["ladimo-server"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000"]
