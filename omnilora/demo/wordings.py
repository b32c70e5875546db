"""Sentence patterns of the SQL task: a training set and a test set that share no head and no condition phrase.

A question is a head with its hole filled by one or two condition phrases: "How many orders{} are there?" with
" from Oslo" and " made in 2021". ``TRAIN`` and ``TEST`` are :class:`Wordings`; both speak of the same columns and
values, so what must generalise is the way of asking.
"""

from __future__ import annotations

from dataclasses import dataclass

KINDS: dict[str, str] = {
    "count": "SELECT COUNT(*) FROM orders",
    "average": "SELECT AVG(price) FROM orders",
    "sum": "SELECT SUM(quantity) FROM orders",
    "distinct": "SELECT COUNT(DISTINCT customer) FROM orders",
    "highest": "SELECT MAX(price) FROM orders",
    "by_city": "SELECT city, COUNT(*) FROM orders",
}


@dataclass(frozen=True)
class Wordings:
    """The patterns of one split.

    Args:
        heads: question kind -> patterns with one ``{}`` for the conditions.
        conditions: condition kind -> phrases with one ``{}`` for the value.
        joins: what stands between two condition phrases.
    """

    heads: dict[str, tuple[str, ...]]
    conditions: dict[str, tuple[str, ...]]
    joins: tuple[str, ...]


TRAIN = Wordings(
    heads={
        "count": (
            "How many orders{} are there?",
            "Count the orders{}.",
            "Give the number of orders{}.",
            "Total number of orders{}?",
            "Tell me how many orders{} were placed.",
            "Number of orders{}, please.",
            "Find out how many orders{} exist.",
            "Show the count of orders{}.",
            "I want the count of all orders{}.",
            "How many orders{} did we receive?",
            "Looking at orders{}, how many do we have?",
            "What is the count of orders{}?",
        ),
        "average": (
            "What is the average price of orders{}?",
            "Average price of the orders{}?",
            "Compute the mean price for orders{}.",
            "How much do orders{} cost on average?",
            "Give me the average price across orders{}.",
            "Find the mean price of all orders{}.",
            "On average, how expensive are orders{}?",
            "Show the average price for the orders{}.",
            "What price do orders{} have on average?",
            "Report the mean of the price in orders{}.",
            "Looking at orders{}, what is the mean price?",
            "I want the average price over all orders{}.",
        ),
        "sum": (
            "What is the total quantity of orders{}?",
            "How many units were sold in orders{}?",
            "Sum the quantity over orders{}.",
            "How many items were bought in total in orders{}?",
            "Total units for orders{}?",
            "Add up the quantities of orders{}.",
            "Give the sum of quantity for orders{}.",
            "How many pieces do orders{} contain altogether?",
            "Find the combined quantity of all orders{}.",
            "Tell me the total number of units in orders{}.",
            "Looking at orders{}, what is the total quantity?",
            "Show how many items all orders{} have together.",
        ),
        "distinct": (
            "How many different customers placed orders{}?",
            "Count the distinct customers of orders{}.",
            "How many unique customers have orders{}?",
            "Number of distinct customers with orders{}?",
            "Give the number of different customers behind orders{}.",
            "How many separate customers are there for orders{}?",
            "Find how many different people made orders{}.",
            "Show the count of unique customers for orders{}.",
            "How many distinct buyers do orders{} have?",
            "I want the number of unique buyers in orders{}.",
            "Looking at orders{}, how many different customers are there?",
            "Without repeats, how many customers placed orders{}?",
        ),
        "highest": (
            "What is the highest price of orders{}?",
            "Find the maximum price among orders{}.",
            "How expensive is the priciest of the orders{}?",
            "Give the top price for orders{}.",
            "Show the largest price in orders{}.",
            "Maximum price of the orders{}?",
            "What does the most expensive of the orders{} cost?",
            "Report the highest price found in orders{}.",
            "What is the biggest price paid in orders{}?",
            "I want the maximum price over all orders{}.",
            "Looking at orders{}, what is the highest price?",
            "How high does the price go in orders{}?",
        ),
        "by_city": (
            "For each city, how many orders{} are there?",
            "Count orders{} by city.",
            "Number of orders{} per city?",
            "Show the order count of every city for orders{}.",
            "List each city with its number of orders{}.",
            "How many orders{} does each city have?",
            "Group orders{} by city and count them.",
            "Give the count per city of orders{}.",
            "For every city, show the number of orders{}.",
            "Tell me city by city how many orders{} there are.",
            "Looking at orders{}, how many are there in each city?",
            "I want the number of orders{} split by city.",
        ),
    },
    conditions={
        "product": (
            " of product {}",
            " where the product is {}",
            " for the product {}",
            " of the {}",
            " that contain a {}",
            " with product {}",
            " concerning the {}",
            " for a {}",
            " containing the {}",
            " with the {} as product",
        ),
        "city": (
            " from {}",
            " in {}",
            " in the city of {}",
            " shipped to {}",
            " where the city is {}",
            " sent to {}",
            " from the city {}",
            " with city {}",
            " coming from {}",
            " with {} as city",
        ),
        "year": (
            " from {}",
            " in {}",
            " in the year {}",
            " made in {}",
            " during {}",
            " where the year is {}",
            " from the year {}",
            " dated {}",
            " with year {}",
            " received in {}",
        ),
        "above": (
            " with a price above {}",
            " priced over {}",
            " costing more than {}",
            " where the price is greater than {}",
            " that cost above {}",
            " more expensive than {}",
            " with a price higher than {}",
            " for more than {}",
            " where the price exceeds {}",
            " with a price larger than {}",
        ),
        "below": (
            " with a price below {}",
            " priced under {}",
            " costing less than {}",
            " where the price is smaller than {}",
            " that cost below {}",
            " cheaper than {}",
            " with a price lower than {}",
            " for less than {}",
            " where the price stays beneath {}",
            " with a price less than {}",
        ),
        "customer": (
            " by {}",
            " placed by {}",
            " from customer {}",
            " of customer {}",
            " made by {}",
            " where the customer is {}",
            " that {} placed",
            " bought by {}",
            " with customer {}",
            " belonging to {}",
        ),
    },
    joins=("", " and"),
)

TEST = Wordings(
    heads={
        "count": (
            "What is the number of orders{}?",
            "Could you work out how many orders{} we got?",
            "In total, how many orders{} were recorded?",
            "I need to know the count for orders{}.",
        ),
        "average": (
            "What do orders{} cost on average?",
            "Tell me the mean of all prices of orders{}.",
            "Work out the average price among orders{}.",
            "How high is the average price in orders{}?",
        ),
        "sum": (
            "How many units do orders{} add up to?",
            "What is the overall quantity across orders{}?",
            "Work out the summed quantity of orders{}.",
            "Report how many items orders{} contain in all.",
        ),
        "distinct": (
            "What is the number of different customers with orders{}?",
            "Tell me how many distinct customers made orders{}.",
            "Work out the count of different buyers for orders{}.",
            "Counting everyone once, how many customers have orders{}?",
        ),
        "highest": (
            "What is the greatest price among orders{}?",
            "Tell me the maximum price in orders{}.",
            "Which price is the highest for orders{}?",
            "How much does the costliest of the orders{} cost?",
        ),
        "by_city": (
            "Break down by city the number of orders{}.",
            "Per city, count the orders{}.",
            "Work out how many orders{} every single city has.",
            "What is the number of orders{} in each of the cities?",
        ),
    },
    conditions={
        "product": (" of a {}", " in which the product is {}", " that are for the {}", " whose product is {}"),
        "city": (" delivered to {}", " out of {}", " whose city is {}", " located in {}"),
        "year": (" placed in {}", " of the year {}", " throughout {}", " whose year is {}"),
        "above": (" costing over {}", " whose price is above {}", " priced at more than {}", " with a price over {}"),
        "below": (" costing under {}", " whose price is below {}", " priced at less than {}", " with a price under {}"),
        "customer": (" ordered by {}", " of the customer {}", " whose customer is {}", " that {} made"),
    },
    joins=("", " and"),
)
