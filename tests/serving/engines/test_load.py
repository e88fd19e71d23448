"""Under load and when engines are killed: nothing lost that could be served, nothing answered from another background."""

import asyncio
import contextlib
import signal
import threading
import time

import httpx
import psutil
import pytest
from running import KEYS

from backdrop.benchmarks.traffic import SceneTraffic, drive, is_foreign, summarize
from backdrop.scenes.world import render_scene
from backdrop.serving import BackdropClient

CLIENTS = 6


@pytest.fixture(autouse=True)
def both_replicas_up(stack):
    """Each test begins with both replicas, whatever the one before it left behind."""
    stack.wait_until_up()


def load(stack, seconds: float, while_running=None, cameras: int = 12):
    """Outcomes of so many seconds of load by both tenants, and who is named by which answer."""
    traffic = SceneTraffic(cameras)
    run = drive(stack.url, "backdrop", traffic.draw, seconds, CLIENTS, keys=list(KEYS.values()))
    if while_running is None:
        return asyncio.run(run), traffic.names
    worker = threading.Thread(target=while_running)
    worker.start()
    outcomes = asyncio.run(run)
    worker.join()
    return outcomes, traffic.names


def test_nothing_is_lost_under_load(stack):
    outcomes, names = load(stack, 30)
    summary = summarize(outcomes, names, 30)
    assert summary.lost == 0, summary.refused
    assert summary.requests > 30 and summary.foreign == 0 and summary.right > 0.8
    assert summary.cached > 0.2


def test_a_killed_replica_costs_cache_not_requests(stack):
    retries = stack.metric("backdrop_retries_total")

    def kill():
        time.sleep(6)
        # Stopped first, so that requests wait in it when it dies: by chance it could have none.
        stack.signal_engine(0, signal.SIGSTOP)
        time.sleep(2)
        stack.signal_engine(0, signal.SIGKILL)

    outcomes, names = load(stack, 25, kill)
    lost = [outcome for outcome in outcomes if outcome.text is None]
    print(f"replica killed: {len(outcomes)} requests, {len(lost)} cut off")
    # Only answers that had begun may end, and they say so.
    assert len(lost) <= CLIENTS
    assert all("the engine was lost during the answer" in outcome.error for outcome in lost), lost
    assert not [outcome for outcome in outcomes if is_foreign(outcome, names)]
    assert sum(outcome.right for outcome in outcomes) > 0.8 * (len(outcomes) - len(lost))
    assert stack.metric("backdrop_retries_total") > retries or lost
    assert "up" in stack.states().values()
    stack.wait_until_up()  # it was started again
    assert stack.process.poll() is None


def test_an_engine_without_its_core_costs_no_requests_either(stack):
    """Only the core is killed, as the OOM killer does: its server goes on answering, with errors inside a 200."""

    def kill():
        time.sleep(5)
        server, *below = stack.engine_processes(1)
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

    outcomes, names = load(stack, 20, kill)
    lost = [outcome for outcome in outcomes if outcome.text is None]
    print(f"core killed: {len(outcomes)} requests, {len(lost)} cut off")
    assert len(lost) <= CLIENTS and not [outcome for outcome in outcomes if is_foreign(outcome, names)], lost
    assert sum(outcome.right for outcome in outcomes) > 0.8 * (len(outcomes) - len(lost))
    stack.wait_until_up()


def test_without_engines_there_is_a_clear_error_and_an_end_to_it(stack):
    def kill():
        time.sleep(4)
        for number in range(2):
            stack.signal_engine(number, signal.SIGKILL)

    outcomes, names = load(stack, 8, kill)
    failed = [outcome for outcome in outcomes if outcome.text is None]
    assert failed and len(failed) < len(outcomes)
    told = ("replica", "the engine was lost during the answer", "the engine ended")
    assert all(any(word in outcome.error for word in told) for outcome in failed), failed[:3]
    assert not [outcome for outcome in outcomes if is_foreign(outcome, names)]
    assert httpx.get(f"{stack.url}/health", timeout=10).status_code == 503
    stack.wait_until_up()
    scene = render_scene("phone", 115_800, 1)
    answer = BackdropClient(f"{stack.url}/v1", api_key=KEYS["north"]).ask(
        scene.image, "What colour is the wallpaper?"
    )
    assert answer.text == next(q.answer for q in scene.questions if q.topic == "wallpaper")
