"""The process of a library: answers each line of stdin with a line of JSON, for contenders.py."""

import json
import sys


def answer_all(make_server):
    """Answers until stdin ends. A library that cannot be loaded is the answer to the first line."""
    try:
        serve(make_server)
    except KeyboardInterrupt:
        pass  # the driver was interrupted and says so


def serve(make_server):
    try:
        server = make_server()
    except Exception as error:  # a missing package, or one whose own libraries are missing
        print(json.dumps({"missing": str(error)}), flush=True)
        return
    for line in sys.stdin:
        try:
            answer = server.answer(line.strip())
        except Exception as error:  # whatever a library raises goes to the driver
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
