# docker build -t maskgit .                                                              for CPUs
# docker build -t maskgit:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .         for NVIDIA GPUs
# docker build -t maskgit:ray --build-arg EXTRA=ray .                                    for a Ray cluster
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRA=serve
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/maskgit
ENV PATH=/opt/maskgit/bin:$PATH
WORKDIR /build
COPY constraints.txt ./
# torch comes from its own index, which need not have what it depends on; that follows with the package.
RUN pip install --no-deps --index-url ${TORCH_INDEX} -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install -c constraints.txt ".[${EXTRA}]"

FROM python:${PYTHON}-slim
COPY --from=build /opt/maskgit /opt/maskgit
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin maskgit
# Nothing is downloaded or written: other models than the bundled one are mounted, say at /models.
ENV PATH=/opt/maskgit/bin:$PATH \
    HOME=/tmp \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import *; build_opener(ProxyHandler({})).open('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["maskgit"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
