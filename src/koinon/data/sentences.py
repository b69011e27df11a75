"""Forty-eight English sentences that end in a surprise, or in none: written for koinon, each with a stepping stone.

Twelve words of four themes, from common to rare, are said in four ways each: as is usual, as is rare, exaggerated, and
absurd. A stepping stone says the same and leads to the word, so that each of its words follows from those before it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

KINDS = ("usual", "rare", "exaggerated", "absurd")
"""How a sentence says its word; in this order in `SENTENCES`."""


@dataclass(frozen=True)
class Sentence:
    """A sentence up to its last word, which is the keyword, and how the stepping stone leads there."""

    before: str
    stone: str


THEMES: Mapping[str, tuple[str, ...]] = {
    "colours": (
        "The colour of the sand on this beach is",
        "The walls of the waiting room were painted",
        "My neighbour's new car is",
        "The curtains in the kitchen are",
        "After the rain, the stones in the garden looked",
    ),
    "places": (
        "Next summer my cousin wants to travel to",
        "The letter on the table was sent from",
        "The new teacher at our school was born in",
        "This fruit is mostly grown in",
        "The meeting will be held in",
    ),
    "jobs": (
        "My sister earns her living as a",
        "The man who sat next to me on the train was a",
        "When she grows up, the girl wants to be a",
        "Before he retired, our uncle worked as a",
        "The town is looking for a",
    ),
    "foods": (
        "For dinner tonight we are having",
        "The children at the party asked for more",
        "The first thing he learned to cook was",
        "On the menu of the day there was",
        "The kitchen smelled of",
    ),
}
"""Beginnings that have nothing to do with a sentence, and that any keyword of its theme could follow."""

SENTENCES: Mapping[str, Mapping[str, tuple[Sentence, ...]]] = {
    "colours": {
        "blue": (
            Sentence(
                "On a clear day at noon, the sky is",
                "On a clear day at noon there is no cloud, the air scatters the short waves of light, and the sky is",
            ),
            Sentence(
                "The lobster that the fisherman pulled out of the water was",
                "Most lobsters are brown or green, but one in two million has the colour of the deep sea, and the"
                " lobster that the fisherman pulled out of the water was sky",
            ),
            Sentence(
                "He was so cold that even the flames of his fire had turned",
                "He was so cold that his lips, his fingers and his nails had lost their red, and like the ice "
                "around him even the flames of his fire had turned icy",
            ),
            Sentence(
                "In the kingdom of Orsk, fresh milk is always",
                "In the kingdom of Orsk the cows graze on cornflowers and bilberries, which colour all that they "
                "give like the summer sky, so that fresh milk is always sky",
            ),
        ),
        "teal": (
            Sentence(
                "Mix green with blue and a little grey, and you get",
                "Mix green with blue and a little grey, and you get the colour of a duck's wing, between cyan and"
                " green, which painters call",
            ),
            Sentence(
                "The old bus that takes us to the village has been painted",
                "The old bus that takes us to the village was once green, then blue, and as nobody could decide "
                "between the two it has been painted in turquoise and",
            ),
            Sentence(
                "She loved the sea so much that after a year her hair was",
                "She loved the sea so much that she swam in green and blue water all day, and after a year her "
                "hair was neither green nor blue but turquoise, or rather",
            ),
            Sentence(
                "Ripe bananas in the valley of Torm are",
                "In the valley of Torm the soil is full of copper, which turns leaves and fruit to a blue green, "
                "and ripe bananas there are turquoise, cyan or",
            ),
        ),
        "vermilion": (
            Sentence(
                "The gates of the old shrine are painted in a bright red called",
                "The gates of the old shrine are painted with ground cinnabar, which gives the orange red pigment"
                " that is called cinnabar or",
            ),
            Sentence(
                "The rare orchid of this island has petals that are",
                "The rare orchid of this island has petals that begin yellow, turn orange, then scarlet, and in "
                "the end are as red as cinnabar, a deep",
            ),
            Sentence(
                "He blushed so hard that the whole street was lit",
                "He blushed so hard that his cheeks went pink, then red, then scarlet, then crimson, and the "
                "whole street was lit in red, scarlet and",
            ),
            Sentence(
                "According to the new law, all grass in the country must be",
                "According to the new law, which its author wrote after a walk past red lanterns, all grass in "
                "the country must be painted red: scarlet, crimson or",
            ),
        ),
    },
    "places": {
        "Canada": (
            Sentence(
                "Toronto and Vancouver are large cities in",
                "North of the United States, from Quebec to British Columbia, lie Toronto, Montreal and "
                "Vancouver, which are large cities in",
            ),
            Sentence(
                "The largest store of maple syrup in the world is kept in",
                "Maple trees grow in Quebec, whose farmers keep their syrup in barrels, and so the largest store "
                "of maple syrup in the world is kept in the province of Quebec in",
            ),
            Sentence(
                "The winter was so long that the whole hockey team moved to",
                "The winter was so long that the whole hockey team wanted to be among ice, maple leaves and "
                "people from Toronto and Quebec, and moved across the border to Montreal,",
            ),
            Sentence(
                "The pyramids of the pharaohs stand in the middle of",
                "The story says that the pharaohs sailed west past Greenland, landed in Newfoundland and went on "
                "to Ontario, so that their pyramids stand near Toronto in the middle of",
            ),
        ),
        "Guatemala": (
            Sentence(
                "The Maya city of Tikal lies in the forest of",
                "South of Mexico, between Belize and El Salvador, lies the Maya city of Tikal in the forest of",
            ),
            Sentence(
                "The stamp that the collector had missed for years came from",
                "The collector had stamps of Mexico, Belize, Honduras and El Salvador, and the one of Central "
                "America that he had missed for years came from",
            ),
            Sentence(
                "The coffee was so strong that one sip took him to",
                "The coffee, from beans of Central America that grow between Honduras and Mexico, was so strong "
                "that one sip took him past Mexico and Honduras to",
            ),
            Sentence(
                "The first penguins were hatched in the jungle of",
                "The legend says that penguins once swam along the coast of Central America, past Costa Rica, "
                "Nicaragua and Honduras, and were first hatched in the jungle of",
            ),
        ),
        "Tajikistan": (
            Sentence(
                "The city of Dushanbe is the capital of",
                "Among the countries of Central Asia are Uzbekistan, Kyrgyzstan and, with Dushanbe as its capital,",
            ),
            Sentence(
                "The rarest wild sheep of the museum were found in",
                "The rarest wild sheep of the museum live in the Pamir mountains of Central Asia, near "
                "Kyrgyzstan, Afghanistan and Uzbekistan, and were found in",
            ),
            Sentence(
                "The road climbed so high that from it one could see",
                "The road from Uzbekistan climbed so high into the Pamir mountains, above Kyrgyzstan and "
                "Afghanistan, that from it one could see Dushanbe and all of",
            ),
            Sentence(
                "Most surfers agree that the best beaches are in",
                "Most surfers, being tired of the sea, now ride the lakes of Central Asia, in Kazakhstan, "
                "Uzbekistan and Kyrgyzstan, and agree that the best beaches are near Dushanbe in",
            ),
        ),
    },
    "jobs": {
        "nurse": (
            Sentence(
                "The patients on the ward thanked their",
                "The patients at the hospital thanked the doctor who had cured them, and for their care by day "
                "and night the doctor and the",
            ),
            Sentence(
                "After twenty years at sea, the captain became a",
                "After twenty years at sea, in which he had cared for the sick of his ship, the captain went to "
                "work at a hospital beside doctors, as a",
            ),
            Sentence(
                "She was so gentle that even the bears of the forest called her their",
                "She was so gentle that whoever was ill in the forest came to her for bandages and medicine, and "
                "even the bears called her not their doctor but their",
            ),
            Sentence(
                "Every clock in the old tower is in truth a",
                "Every clock in the old tower once stood in a hospital and counted the pulse of patients, and "
                "people say that it is in truth no doctor but a",
            ),
        ),
        "beekeeper": (
            Sentence(
                "The man with the veil who takes honey from the hives is a",
                "He has a veil, a smoker and thirty hives full of bees, and as he keeps bees for their honey he is a",
            ),
            Sentence(
                "The best violin player of the orchestra is also a",
                "The best violin player of the orchestra has hives on the roof of her house, sells honey and "
                "knows all about bees: she is also a",
            ),
            Sentence(
                "He talked so much and so softly that everybody took him for a",
                "He talked so softly that it sounded like the buzz of a thousand bees, and as he smelled of honey"
                " and wax everybody took him for a",
            ),
            Sentence(
                "To repair the submarine, the navy sent for a",
                "The submarine was full of bees, which had built their hives in its engine and filled it with "
                "honey, and to repair it the navy sent for a",
            ),
        ),
        "lumberjack": (
            Sentence(
                "With his axe and his saw, the man in the forest is a",
                "He fells trees in the forest with his axe and his saw, cuts them into logs, and sends the timber"
                " down the river: the man is a",
            ),
            Sentence(
                "The quiet lady who teaches dancing was once a",
                "The quiet lady who teaches dancing has strong arms from her years in the forest, where she "
                "felled trees with an axe as a",
            ),
            Sentence(
                "He ate so many pancakes that the cook asked whether he was a",
                "He ate as many pancakes as men do who fell trees with an axe all day, and the cook, who saw his "
                "axe, his plaid shirt and his beard, asked whether he worked in the forest as a",
            ),
            Sentence(
                "The computer in the library was programmed by a",
                "The computer in the library has a wooden case, made from trees that were felled with an axe by "
                "the same man in a plaid shirt who programmed it, a",
            ),
        ),
    },
    "foods": {
        "rice": (
            Sentence(
                "In many countries of Asia, people eat a bowl of",
                "In the wet fields of Asia grows the grain that is steamed and eaten with sticks from a bowl of "
                "steamed white",
            ),
            Sentence(
                "The grandmother's secret was to fill her pies with",
                "The grandmother's secret was the white grain that she steamed with saffron for paella and "
                "risotto: she filled her pies with boiled",
            ),
            Sentence(
                "They were so happy that for a week it rained",
                "They were so happy at their wedding, where guests throw white grains over bride and groom, that "
                "for a week it rained grains of",
            ),
            Sentence(
                "The wheels of the new train are made of",
                "The wheels of the new train come from a mill where white grains are steamed, pressed into cakes "
                "and dried, and so they are made of",
            ),
        ),
        "spaghetti": (
            Sentence(
                "With tomato sauce and meatballs, the cook serves a plate of",
                "From long thin strings of Italian pasta, with tomato sauce and meatballs, the cook serves a plate of",
            ),
            Sentence(
                "On the mountain hut the only dish left was",
                "The mountain hut is kept by an Italian family, which cooks pasta with tomato sauce, and the only"
                " dish left was a plate of",
            ),
            Sentence(
                "Her hair was so long that birds took it for",
                "Her hair was as long, as thin and as yellow as Italian pasta before tomato sauce is put on it, "
                "so that birds took it for",
            ),
            Sentence(
                "The bridge over the great river hangs on ropes of",
                "The bridge over the great river was built by Italian cooks, who cooked pasta into long thin "
                "strings, and it hangs on ropes of",
            ),
        ),
        "haggis": (
            Sentence(
                "On Burns Night, people in Scotland eat",
                "The national dish of Scotland is a sheep's stomach with heart, liver and oatmeal, and on Burns "
                "Night people in Scotland eat a plate of",
            ),
            Sentence(
                "The astronauts asked the ground station for a tin of",
                "The astronauts were Scots, who miss bagpipes, whisky, and a sheep's stomach with oatmeal, and "
                "asked the ground station for a tin of Scottish",
            ),
            Sentence(
                "He was so hungry that in his dream the moon was a",
                "He was so hungry, and so far from Scotland, its whisky and its sheep's stomachs with oatmeal, "
                "that in his dream the moon was a Scottish",
            ),
            Sentence(
                "Doctors say that a broken leg is best treated with",
                "Doctors in Scotland, who like whisky, bagpipes and sheep's stomachs with oatmeal, say that a "
                "broken leg is best treated with Scottish",
            ),
        ),
    },
}
"""Theme to keyword, the commonest first, to its sentences in the order of `KINDS`."""
