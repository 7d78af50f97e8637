"""A visit to a server that runs in this process, as long as somebody looks."""

import os
import signal
import threading

from marble.serve import start


def visited(app, look, **options):
    """Serve in this thread, as `marble serve` does, and let another one `look(url)`; it must come to its end."""
    seen = []

    def visit(url):
        try:
            look(url)
            seen.append(url)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    scheme = "https" if "certificate" in options else "http"
    with start.listen("localhost", 0, None) as port:
        visitor = threading.Thread(target=visit, args=(f"{scheme}://localhost:{port.getsockname()[1]}",))
        try:
            start.serve(app, port, **options, opened=visitor.start)
        finally:
            app.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    visitor.join(10)
    assert len(seen) == 1
