"""Blocks drawn for each image: the paper's introduction allows for it, how they are laid out is ours."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The images of a mini-batch for which a block is active: `count` in a row from `start`, from 0.

    Behind the last image the row goes on with the first. A mini-batch is in random order, so each image is as
    likely as any other, and with a random start for each block an image's b_1..b_L are independent.
    """

    start: int
    count: int  # at least 2, so that BatchNorm has a variance

    def cut(self, num_images: int) -> tuple[list[int], list[bool]]:
        """Where to cut a mini-batch: the sizes of its rows of images, and for which of them b_l is 1.

        No row is empty: joined with one, a gradient would lose its memory layout.
        """
        wrapped = self.start + self.count - num_images  # images from the first on
        rows = (
            [(wrapped, True), (self.start - wrapped, False), (num_images - self.start, True)]
            if wrapped > 0
            else [(self.start, False), (self.count, True), (-wrapped, False)]
        )
        sizes, are_active = zip(*(row for row in rows if row[0]), strict=True)
        return list(sizes), list(are_active)


Active = bool | Segment
