# The service `mmsid serve` with a bundle that is mounted at /bundle.
#
#   docker build -t mmsid .
#   docker run --rm -p 8765:8765 -e MMSID_API_KEY --user "$(id -u):$(id -g)" \
#     -v "$PWD/runs/demo/bundle:/bundle:ro" -v "$PWD/state:/state" mmsid
#
# PIP_EXTRA_INDEX_URL may name an index with CPU builds of torch, which make the image several gigabytes smaller.
FROM python:3.12-slim

ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints-cpu.txt ./
COPY prompts prompts
COPY configs configs
COPY mmsid mmsid
RUN pip install --no-cache-dir -c constraints-cpu.txt ".[serve]" \
    && useradd --create-home --uid 10001 mmsid \
    && mkdir /state && chown mmsid /state

USER mmsid
WORKDIR /state
ENV HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
VOLUME ["/state"]
EXPOSE 8765
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8765/healthz', timeout=5)"]
ENTRYPOINT ["mmsid", "serve", "/bundle", "--host", "0.0.0.0", "--state", "/state/items.sqlite"]
