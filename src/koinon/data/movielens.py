"""MovieLens-100K as a multi-task table: does a person like, love, dislike or hate a film?"""

import polars as pl

from koinon.data import sources
from koinon.data.tables import World, table_world
from koinon.nn.tasks import Task

TASKS = (
    Task("like", group="positive"),  # 4 or 5 stars
    Task("love", group="positive"),  # 5 stars
    Task("dislike", group="negative"),  # 1 or 2 stars
    Task("hate", group="negative"),  # 1 star
)


def movielens(ratings: int | None = None) -> World:
    """The four tasks on the first ``ratings`` ratings by user (all if None), each user's ratings cut by time.

    80 % of the labels of love and hate are hidden outside the test part, which makes them the sparse tasks.
    """
    frame = frame_of(*(sources.read("movielens", member) for member in ("ratings", "people", "films")))
    if ratings is not None:
        frame = frame.sort("user_id", "timestamp").head(ratings)
    return world_of(frame)


def world_of(frame: pl.DataFrame) -> World:
    """The tasks on a table as `frame_of` gives it."""
    return table_world(
        frame,
        TASKS,
        group="user_id",
        time="timestamp",
        categories=["user_id", "item_id", "region"],
        hide={"love": 0.8, "hate": 0.8},
    )


def frame_of(ratings: bytes, people: bytes, films: bytes) -> pl.DataFrame:
    """Join the three files: one row a rating, genres as a column of 0 and 1 each."""
    log, who, what = (_read(part) for part in (ratings, people, films))
    genres = sorted({genre for row in what["class"].drop_nulls() for genre in row.split()})
    what = what.select(
        "item_id",
        pl.col("release_year").cast(pl.Float64, strict=False).fill_null(strategy="mean").alias("year"),
        *(
            pl.col("class").fill_null("").str.split(" ").list.contains(genre).cast(pl.Float64).alias(genre)
            for genre in genres
        ),
    )
    who = who.select(
        "user_id", pl.col("age").cast(pl.Float64), "gender", "occupation", region=pl.col("zip_code").str.head(1)
    )
    stars = pl.col("rating").cast(pl.Float64)
    return (
        log.join(who, on="user_id", maintain_order="left")
        .join(what, on="item_id", maintain_order="left")
        .with_columns(
            pl.col("timestamp").cast(pl.Float64),
            like=(stars >= 4).cast(pl.Int8),
            love=(stars == 5).cast(pl.Int8),
            dislike=(stars <= 2).cast(pl.Int8),
            hate=(stars == 1).cast(pl.Int8),
        )
        .drop("rating")
    )


def _read(content: bytes) -> pl.DataFrame:
    """A tab-separated file whose header cells are ``name:type``."""
    frame = pl.read_csv(content, separator="\t", infer_schema=False, quote_char=None)
    return frame.rename({name: name.split(":")[0] for name in frame.columns})
