import multiprocessing
import os
import signal
import time

import pytest

from geode_jax.data.workers import deaf_to_ctrl_c


def report_mask(queue) -> None:
    queue.put(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_do_not_hear_of_ctrl_c(method):
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    with deaf_to_ctrl_c():
        worker = context.Process(target=report_mask, args=(queue,))
        worker.start()
    assert queue.get()
    worker.join()


def test_this_process_hears_of_it_after():
    with deaf_to_ctrl_c():
        pass
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
