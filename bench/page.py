"""What does the page look like?  Pictures of it for the README, in page*.png.

    python bench/page.py

Fills a private server with the jobs of a shop, and takes the pictures with Chromium.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import test_microq  # noqa: E402  its server, and its browser
from microq import CronScheduler, Queue, RateLimit, Retry, SimpleWorker  # noqa: E402

JOBS = """
import time
import microq

def send(address, subject=""):
    if "bad" in address:
        raise ConnectionRefusedError(f"mail.example.com refused {address}")

def resize(path, width=0):
    pass

def report(month):
    job = microq.get_current_job()
    job.meta["progress"] = 64
    job.save_meta()
    time.sleep(60)
"""


def fill(connection: redis.Redis) -> None:
    """Enqueue the jobs of a shop, and run some."""
    import shop

    mail, images, reports = (
        Queue(name, connection) for name in ("mail", "images", "reports")
    )
    for number in range(40):
        mail.enqueue(shop.send, f"ann{number}@example.com", subject="Your order")
        images.enqueue(shop.resize, f"/pictures/{number}.jpg", width=640)
    for number in range(6):
        mail.enqueue(shop.send, f"bad{number}@example.com", subject="Hello")
    SimpleWorker([mail, images]).work(burst=True, logging_level=None)
    for number in range(23):
        images.enqueue(shop.resize, f"/pictures/{number}.jpg", width=1024)
    for month in range(1, 8):
        reports.enqueue_in(3600 * month, shop.report, f"2027-{month:02}")
    for number in range(6):
        limit = RateLimit("smtp", concurrency=2)
        mail.enqueue(shop.send, f"eve{number}@example.com", rate_limit=limit)
    reports.enqueue(shop.report, "2026-12", retry=Retry(3))
    scheduler = CronScheduler(connection, name="shop")
    scheduler.register(
        shop.report, "reports", ("all",), cron="0 6 * * mon-fri", name="daily report"
    )
    scheduler.save()
    make_history(connection)


def make_history(connection: redis.Redis) -> None:
    """Store the figures of an hour, as if many workers had run."""
    minute = int(time.time() // 60)
    for name, most in (("mail", 180), ("images", 60)):
        figures = {}
        for i in range(60):
            wave = 0.55 + 0.4 * math.sin(i / 9) + 0.2 * random.random()
            figures[f"f{minute - 59 + i}"] = int(most * wave)
            if 20 < i < 27:
                figures[f"x{minute - 59 + i}"] = random.randrange(most // 10)
        connection.hset(f"microq:{{{name}}}:stats", mapping=figures)


def main() -> None:
    """Take a picture of the overview, and of a list on a narrow, dark screen."""
    random.seed(4)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "shop.py").write_text(JOBS)
        sys.path.insert(0, folder)
        server = test_microq.Server(home)
        fill(redis.Redis.from_url(server.url))
        command = test_microq.command_line(
            "worker", "reports", "--url", server.url, "--name", "web1", "--path", home
        )
        environ = test_microq.child_env()
        worker = subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL)
        page, url = test_microq.start_page(server)
        browser = test_microq.Browser(home / "browser")
        try:
            browser.look(1080, 760)
            browser.open(url)
            test_microq.wait_until(lambda: "shop.report" in browser.text())
            browser.screenshot(HERE / "page.png", whole=False)
            browser.look(400, 760, dark=True)
            browser.open(f"{url}?queue=mail&state=failed")
            browser.screenshot(HERE / "page_narrow.png", whole=False)
        finally:
            browser.close()
            test_microq.end_process(page)
            worker.kill()
            worker.wait()
            server.stop()


if __name__ == "__main__":
    main()
