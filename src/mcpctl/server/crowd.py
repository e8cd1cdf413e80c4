"""How many visitors each worker of a server has."""

import mmap


class Crowd:
    """The counts of all workers, in memory that they share. Made before they are forked."""

    def __init__(self, workers: int) -> None:
        self._counts = memoryview(mmap.mmap(-1, 4 * workers)).cast("I")
        self.place = 0
        """Which of them this process is."""

    def note(self, count: int) -> None:
        """So many are here now."""
        self._counts[self.place] = count

    def has_more(self, count: int) -> bool:
        """Note how many are here; whether another worker has fewer, as far as that one has said."""
        self.note(count)
        return count > min(self._counts)
