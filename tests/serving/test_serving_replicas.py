"""Which replicas get requests, and which of them a background belongs to."""

import asyncio
import threading

import httpx
import pytest
from fake_engine import red_scene, wait_until
from running_gateway import (
    RunningGateway,
    asked,
)

from backdrop.serving.replicas import Replicas


def test_text_alone_goes_to_the_least_busy(gateway, engines):
    for engine in engines:
        engine.mode = "slow"
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(gateway.text())) for _ in range(4)]
    for started, thread in enumerate(threads, 1):
        thread.start()
        wait_until(lambda started=started: len(asked(*engines)) == started)
    assert [len(engine.requests) for engine in engines] == [2, 2]
    for engine in engines:
        engine.step(2)
    for thread in threads:
        thread.join()
    assert answers == ["None | q"] * 4


def test_a_replica_is_kept_out_while_it_drops_alpha(serve, engines):
    engines[0].sees_alpha = False
    gateway = serve()
    state = gateway.health()
    assert "does not see patch groups" in state[engines[0].url] and state[engines[1].url] == "up"
    for shade in range(0, 250, 50):
        gateway.text(red_scene(width=0, shade=shade))
    assert engines[0].requests == [] and len(engines[1].requests) == 5
    engines[0].sees_alpha = True
    gateway.wait_for(engines[0])
    for shade in range(0, 250, 20):
        gateway.text(red_scene(width=0, shade=shade))
    assert engines[0].requests
    # It is probed again when it comes back, since another engine may have been started there.
    engines[0].stop()
    gateway.wait_for(engines[0], up=False)
    engines[0].sees_alpha = False
    engines[0].start()
    wait_until(lambda: "does not see" in gateway.health()[engines[0].url])


def test_a_replica_that_is_not_healthy_is_not_asked(gateway, engines):
    engines[0].healthy = False
    gateway.wait_for(engines[0], up=False)
    assert gateway.health()[engines[0].url] == "down: /health answers 503"
    for shade in range(0, 250, 50):
        gateway.text(red_scene(width=0, shade=shade))
    assert engines[0].requests == []


def test_an_engine_that_refuses_the_probe_is_kept_out(serve, engines):
    engines[0].probe_mode = "400"
    gateway = serve()
    state = gateway.health()
    assert (
        "the engine answers a patch group with 400" in state[engines[0].url]
        and "refused" in state[engines[0].url]
    )
    assert gateway.ask(red_scene()).status_code == 200 and engines[0].requests == []


def owners(gateway: RunningGateway, engines, shades, places=(0,)) -> dict[int, str]:
    """Whose each background is: all frames of it, with objects at different places, go to the same replica."""
    found = {}
    for shade in shades:
        before = [len(engine.requests) for engine in engines]
        for x in places:
            gateway.text(red_scene(x, 14, shade))
        (found[shade],) = [
            engine.url
            for engine, count in zip(engines, before, strict=True)
            if len(engine.requests) == count + len(places)
        ]
    return found


def test_a_background_stays_with_its_replica(serve, engines):
    # A reference that is made anew has another key, and may move: it must be encoded anew anyway.
    gateway = serve(secret="always the same", matching={"refresh": False})
    shades = range(0, 250, 15)
    first = owners(gateway, engines, shades, (0, 28))
    assert set(first.values()) == {engine.url for engine in engines}
    assert owners(gateway, engines, shades) == first
    engines[0].stop()
    gateway.wait_for(engines[0], up=False)
    assert set(owners(gateway, engines, shades).values()) == {engines[1].url}
    engines[0].start()
    gateway.wait_for(engines[0])
    assert owners(gateway, engines, shades) == first


def test_a_lost_replica_moves_its_own_backgrounds_only():
    urls = [f"http://replica-{i}:8000" for i in range(4)]
    replicas = Replicas(urls, client=None)
    for replica in replicas.replicas:
        replica.up = True
    keys = [f"background {i}" for i in range(400)]
    before = {key: replicas.ranked(key)[0].url for key in keys}
    shares = [sum(url == owner for owner in before.values()) for url in urls]
    assert min(shares) > 60
    replicas.mark_down(replicas.replicas[2], "gone")
    after = {key: replicas.ranked(key)[0].url for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != urls[2])
    moved = [sum(after[key] == url for key in keys if before[key] == urls[2]) for url in urls]
    assert moved[2] == 0 and min(moved[:2] + moved[3:]) > 10
    assert [replica.url for replica in replicas.ranked("background 0")][-1] == urls[2]


def test_one_replica_that_hangs_does_not_hide_another():
    async def main():
        async def answer(request):
            if request.url.host == "hangs" and not first:
                await asyncio.sleep(9)
            return httpx.Response(200 if alive else 503)

        first, alive = True, False
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            replicas = Replicas(["http://hangs", "http://works"], client, seconds=0.01)
            await replicas.start()
            first = False
            await asyncio.sleep(0.05)
            alive = True
            for _ in range(200):
                if replicas.replicas[1].up:
                    break
                await asyncio.sleep(0.01)
            found = [replica.up for replica in replicas.replicas]
            await replicas.stop()
            left = len(asyncio.all_tasks()) - 1
        return found, left

    assert asyncio.run(main()) == ([False, True], 0)


@pytest.mark.parametrize("late, stays", ((1, True), (2, True), (3, False)))
def test_a_busy_replica_keeps_its_backgrounds(late, stays):
    """One or two health checks that time out mean that it is busy; a refused connection takes it down at once."""

    async def main():
        async def answer(request):
            if failure is not None:
                raise failure("no", request=request)
            return httpx.Response(200)

        failure = None
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            replicas = Replicas(["http://one"], client)
            (replica,) = replicas.replicas
            await replicas.check_health()
            failure = httpx.ReadTimeout
            for _ in range(late):
                await replicas.check_health()
            states = [replica.up]
            failure = None
            await replicas.check_health()
            failure = httpx.ReadTimeout
            await replicas.check_health()  # the count begins anew
            states.append(replica.up)
            failure = httpx.ConnectError
            await replicas.check_health()
            states.append(replica.up)
        return states

    assert asyncio.run(main()) == [stays, True, False]
