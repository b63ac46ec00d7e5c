"""A `python` for the tests of recipes that starts in no time: our scripts are run by forks of one
process that has imported what they import, which is nearly all that a stage of a tiny recipe costs.

    python tests/forked_python.py serve SOCKET       imports, and forks for each call until it is
                                                     killed
    python tests/forked_python.py call SOCKET ARGS   runs `python ARGS` there; anything but a script
                                                     of ours or a recipe's module is left to the
                                                     real one

A fork has the working folder, environment, standard streams, process group and exit status of the
call: who kills the group, as recipes/ance.sh does at its end, kills it too. (One that outlived its
recipe would hold its output open, and whoever reads that to the end would wait for ever.) A single
process that is killed by its id is the caller alone, so tests that do this take the real Python.
"""

import json
import os
import signal
import socket
import sys


def serve(path: str) -> None:
    sys.path.insert(0, os.getcwd())
    import transformers.models.bert.modeling_bert  # noqa: F401

    import encode  # noqa: F401
    import evaluate  # noqa: F401
    import finetune_biencoder  # noqa: F401
    import mine_negatives  # noqa: F401
    import pretrain_mae  # noqa: F401
    import recipes.cluster_queries  # noqa: F401
    import recipes.import_training_data  # noqa: F401
    import recipes.score_pairs  # noqa: F401

    sys.path.pop(0)
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{path}.new")
    server.listen()
    os.rename(f"{path}.new", path)  # from here on it answers
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            answer(connection)
        connection.close()


def answer(connection: socket.socket) -> None:
    request, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    call, status = json.loads(request), 1
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.setpgid(0, call["group"])
    os.chdir(call["folder"])
    os.environ.clear()
    os.environ.update(call["environment"])
    try:
        run(call["arguments"])
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    import multiprocessing

    for child in multiprocessing.active_children():
        child.terminate()  # a worker of a loader; an ordinary exit would end it
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(bytes([status]))
    os._exit(status)


def run(arguments: list[str]) -> None:
    import runpy

    if arguments[0] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def call(path: str, arguments: list[str]) -> int:
    ours = arguments and (
        arguments[0].endswith(".py")
        or (arguments[0] == "-m" and arguments[1].startswith("recipes."))
    )
    if not ours:
        os.execv(sys.executable, [sys.executable, *arguments])
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    request = {
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "arguments": arguments,
        "group": os.getpgrp(),
    }
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    status = connection.recv(1)
    return status[0] if status else 137  # it was killed


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(call(sys.argv[2], sys.argv[3:]))
