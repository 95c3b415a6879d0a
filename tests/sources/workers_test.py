import multiprocessing
import os
import signal
import threading
import time

import pytest

from geode_jax.sources.workers import shielded_from_ctrl_c


def report_mask(queue) -> None:
    queue.put(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_do_not_hear_of_ctrl_c(method):
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    with shielded_from_ctrl_c():
        worker = context.Process(target=report_mask, args=(queue,))
        worker.start()
    assert queue.get()
    worker.join()


def test_this_process_hears_of_it_after():
    with shielded_from_ctrl_c():
        pass
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)


def test_this_process_does_not_hear_of_it_meanwhile():
    """The signal is handled also if another thread receives it instead of the main one."""
    over, done = threading.Event(), []
    other = threading.Thread(target=over.wait)
    other.start()
    with pytest.raises(KeyboardInterrupt), shielded_from_ctrl_c():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        done.append("all that had to be done")
    over.set()
    other.join()
    assert done
