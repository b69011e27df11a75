"""Write a made table of film ratings, to try the commands of the guides on: python make_ratings.py [ratings.csv]."""

import csv
import datetime
import random
import sys
from pathlib import Path

GENRES = ("comedy", "crime", "drama", "horror", "romance")


def make_ratings(file: Path, people: int = 80, each: int = 40, films: int = 120) -> None:
    """One row a rating: who, what, when, how many stars, and labels made from the stars.

    A third of the labels of love and hate is left empty, as for questions that not everyone was asked. The same file
    each time.

    Args:
        file: the CSV file to write.
        people: how many people rate.
        each: how many films each of them rates.
        films: how many films there are.
    """
    rng = random.Random(0)
    start = datetime.datetime(2024, 1, 1)
    catalogue = [(rng.choice(GENRES), rng.gauss(0, 0.6)) for _ in range(films)]
    with file.open("w", newline="", encoding="utf-8") as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(["user_id", "item_id", "age", "genre", "when", "like", "love", "hate", "stars"])
        for person in range(1, people + 1):
            age = rng.randint(16, 75)
            taste = {genre: rng.gauss(0, 1.0) for genre in GENRES}
            taste["horror"] += (45 - age) / 20  # the young like to be scared
            for item in rng.sample(range(films), each):
                genre, quality = catalogue[item]
                stars = min(max(round(3.4 + taste[genre] + quality + rng.gauss(0, 0.7)), 1), 5)
                when = start + datetime.timedelta(minutes=rng.randrange(525_600))
                love, hate = (int(stars == 5), int(stars == 1)) if rng.random() > 1 / 3 else ("", "")
                row = [person, item + 1, age, genre, when.isoformat(), int(stars >= 4), love, hate, stars]
                table.writerow(row)


if __name__ == "__main__":
    make_ratings(Path(sys.argv[1] if len(sys.argv) > 1 else "ratings.csv"))
