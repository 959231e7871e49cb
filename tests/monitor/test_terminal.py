"""rich is loaded so that nobody notices."""

from ..helpers import run_after_torch


def test_what_shows_results_draws_no_random_number() -> None:
    run_after_torch(
        "import secorder, secorder.monitor.progress\n"
        "before = random_states()\n"
        "text = str(secorder.report({'a': torch.arange(3.0)}))\n"
        "with secorder.monitor.progress.progress_bar(True, 'HVPs', 3) as advance:\n"
        "    advance(3)\n"
        "assert 'rich' in sys.modules and 'tr F' in text\n"
        "assert random_states() == before"
    )
