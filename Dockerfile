FROM python:3.13-slim
WORKDIR /src
COPY pyproject.toml README.md LICENSE providers.py vai.py server.py sandbox.py voice.py live.py ./
RUN pip install --no-cache-dir '.[server,voice,live,redis]' && rm -rf /src/*

# A vai.toml mounted at /etc/vai is read from here.
WORKDIR /etc/vai
RUN useradd --system --uid 10001 --home-dir /nonexistent vai
USER 10001
ENV VAI_HOST=0.0.0.0 VAI_LOG_FORMAT=json PYTHONUNBUFFERED=1
EXPOSE 8080
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('VAI_PORT', 8080)), timeout=2); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
STOPSIGNAL SIGTERM
CMD ["vai-server"]
