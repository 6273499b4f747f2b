# A small image for CPUs: no torch, no compiler, not root. `docker build -t inflight .`; docs/deploy.md shows the rest.
#   --build-arg EXTRAS=torch    adds what other families of language models, LoRA and torch's models need
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# The compiler builds the CPU engine for every instruction set, and nghttp2 is what the gRPC door speaks with.
# hadolint ignore=DL3008
RUN apt-get update -q && apt-get install -y -q --no-install-recommends g++ libnghttp2-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
ARG EXTRAS=""
RUN python -m venv /opt/inflight \
    && /opt/inflight/bin/pip install --no-cache-dir -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update -q && apt-get install -y -q --no-install-recommends libnghttp2-14 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp inflight
COPY --from=build /opt/inflight /opt/inflight
# The root may be read-only: what is fetched or packed goes to /cache, what is temporary to /tmp.
RUN install -d -o inflight -g inflight /cache
ENV PATH=/opt/inflight/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/cache/hub \
    INFLIGHT_PACKED_CACHE=/cache/packed \
    INFLIGHT_HTTP=0.0.0.0:8080 \
    INFLIGHT_GRPC=0.0.0.0:8081
USER 10001:10001
VOLUME /cache
EXPOSE 8080 8081
# In place of TGI's image: `docker run --entrypoint text-generation-launcher ... --model-id NAME`.
ENTRYPOINT ["inflight"]
CMD ["serve", "--help"]
