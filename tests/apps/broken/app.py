"""Cannot be built: one of its requirements does not exist."""

import os
import socket

from bottle import Bottle, response

app = Bottle()


@app.get("/")
def index() -> str:
    response.content_type = "text/plain; charset=utf-8"
    return f"Hello from Flynn, job {os.environ.get('FLYNN_JOB_ID', socket.gethostname())}\n"


@app.get("/env/<name>")
def variable(name: str) -> str:
    response.content_type = "text/plain; charset=utf-8"
    return os.environ.get(name, "") + "\n"
