# rlgaf for CPU nodes. From the root of the project:
#   docker build -f deploy/docker/cpu.Dockerfile -t rlgaf:0.1.0 .
#
# Nothing of DeepSpeed is compiled, in the image or at run time: learner/engine.py uses torch's fused AdamW and switches
# DeepSpeed's own operators off. g++ stays in the final image because torch, Triton and vLLM compile small kernels when
# they first run.
ARG PYTHON_IMAGE=python:3.11.13-slim-bookworm

# The pinned packages, the same list as make setup installs.
FROM ${PYTHON_IMAGE} AS packages
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
COPY Makefile requirements/torch-cpu.txt requirements/cpu.txt ./
# The Makefile knows where CPU builds of torch are.
RUN python -m pip install --no-deps --no-compile --prefix=/install \
      --index-url "$(sed -n 's/^TORCH_CPU_INDEX := //p' Makefile)" -r torch-cpu.txt \
    && python -m pip install --no-deps --no-compile --require-hashes --prefix=/install -r cpu.txt

# rlgaf itself, built with the setuptools of the list.
FROM packages AS wheel
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY rollout rollout
COPY learner learner
COPY discriminator discriminator
COPY services services
RUN PYTHONPATH=/install/lib/python3.11/site-packages \
    python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON_IMAGE}
# The list has setuptools of its own, which would otherwise lie over the base image's, file by file.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && python -m pip uninstall --yes --root-user-action=ignore setuptools wheel \
    && useradd --uid 1000 --user-group --create-home rlgaf \
    && install -d -o rlgaf -g rlgaf /runs /cache /data
# Into the interpreter's own prefix: a login shell, which KubeRay may use, resets PATH to the system's.
COPY --from=packages /install /usr/local
# A layer of its own: a change of the project's code does not move the packages.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir --no-deps --no-compile /wheels/*.whl
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/home/rlgaf \
    USER=rlgaf \
    HF_HOME=/cache/huggingface \
    RAY_JOB_STOP_WAIT_TIME_S=600
USER 1000:1000
WORKDIR /runs
EXPOSE 6379 8000 8080 8265
# Of the Ray node that the default command starts. Kubernetes uses the chart's probes instead.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8265/api/gcs_healthz', timeout=5)"]
CMD ["ray", "start", "--head", "--block", "--disable-usage-stats", "--dashboard-host=127.0.0.1"]
