# Installs only the pinned packages. Runs as any user, also with a read-only root file system.
FROM python:3.13-slim AS build
WORKDIR /build
COPY requirements.txt ./
# The hashes are checked here, so that the package can be installed below without the network.
RUN pip download --quiet --no-cache-dir --require-hashes --dest wheels -r requirements.txt
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY sequencerd ./sequencerd
COPY sql ./sql
COPY examples ./examples
COPY systemd ./systemd
RUN python -m venv --without-pip /opt/sequencerd
RUN pip --python /opt/sequencerd/bin/python install --quiet --no-cache-dir --no-index --find-links wheels ".[uvloop]"

FROM python:3.13-slim
COPY --from=build /opt/sequencerd /opt/sequencerd
USER 10001:10001
ENV PATH=/opt/sequencerd/bin:$PATH PYTHONDONTWRITEBYTECODE=1 SEQUENCERD_HTTP_LISTEN=127.0.0.1:9187
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s CMD ["python", "-c", "import os; from http.client import HTTPConnection; host, _, port = os.environ['SEQUENCERD_HTTP_LISTEN'].rpartition(':'); to = HTTPConnection(host.strip('[]') or '127.0.0.1', int(port), timeout=9); to.request('GET', '/healthz'); exit(to.getresponse().status != 200)"]
ENTRYPOINT ["sequencerd"]
CMD ["run"]
