# Builds with the pinned packages, runs as nobody in particular on a read-only root.
FROM python:3.13-slim AS build
WORKDIR /build
RUN python -m venv /opt/sequencerd
COPY requirements.txt ./
RUN /opt/sequencerd/bin/pip install --no-cache-dir --require-hashes -r requirements.txt
COPY pyproject.toml README.md ./
COPY sequencerd ./sequencerd
COPY sql ./sql
COPY examples ./examples
RUN /opt/sequencerd/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.13-slim
COPY --from=build /opt/sequencerd /opt/sequencerd
USER 10001:10001
ENV PATH=/opt/sequencerd/bin:$PATH PYTHONDONTWRITEBYTECODE=1 SEQUENCERD_LOG_FORMAT=json
HEALTHCHECK --interval=30s --timeout=10s CMD ["sequencerd", "status", "--json"]
ENTRYPOINT ["sequencerd"]
CMD ["run"]
