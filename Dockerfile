# The server and the page in the browser, in one image. It is built from the repository and nothing else:
#
#   docker build -t kedit .
#   docker build -t kedit:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 .
#   docker run --rm -p 127.0.0.1:8000:8000 -v kedit:/data kedit
#
# docs/containers.md tells the rest.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Where the build of torch comes from; everything else comes from PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PATH=/opt/venv/bin:$PATH \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    GRADIO_ANALYTICS_ENABLED=False \
    TOKENIZERS_PARALLELISM=false \
    HF_HOME=/data/huggingface \
    KEDIT_HOME=/data/kedit \
    HF_KEDIT_CACHE=/data/cache

# The one folder that is written to: models, statistics, saved edits.
RUN useradd --uid 10001 --create-home kedit && mkdir /data && chown kedit /data

WORKDIR /opt/kedit

# Torch first and alone, so that a change of the code does not fetch it again.
COPY constraints.txt ./
RUN python -m venv /opt/venv
RUN pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"

COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY hparams hparams
COPY hf_kedit hf_kedit
RUN pip install -c constraints.txt ".[demo,serve,gguf]"

USER kedit
WORKDIR /data
VOLUME /data
EXPOSE 8000 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["kedit"]
CMD ["serve", "kedit/world-llama", "--host", "0.0.0.0"]
