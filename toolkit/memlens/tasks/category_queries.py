"""Queries of four kinds for a semantic cache: several wordings of each question, and who means the same as whom.

code     near-duplicates of different meaning ("sort ascending", "sort descending"): the hard case for embeddings
chat     the same wish in quite different words
finance  one question about ten companies, with an answer that goes out of date
legal    long templates about different subjects
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CATEGORIES", "Query", "category_queries"]

CATEGORIES = ("code", "chat", "finance", "legal")


class Query(NamedTuple):
    category: str
    intent: int  # queries of one category with one intent want the same answer
    wording: int  # 0 to 5
    text: str


OPERATIONS = (
    "sort a list in ascending order", "sort a list in descending order", "read a file line by line",
    "write a file line by line", "encode a string to base64", "decode a string from base64", "round a number up",
    "round a number down", "convert celsius to fahrenheit", "convert fahrenheit to celsius",
    "find the first match in a string", "find the last match in a string", "push to the front of a list",
    "push to the back of a list", "open a socket for reading", "open a socket for writing", "parse a date from text",
    "reverse a linked list", "count the words of a text", "call a web service",
)  # fmt: skip
LANGUAGES = ("python", "rust")
CODE = (
    "how to {} in {}", "{1} code to {0}", "{} using {}", "how do I {} in {}?", "show me how to {} in {}", "write {1} that can {0}",
)  # fmt: skip
COMPANIES = (
    "Acme", "Borealis", "Cinder", "Dunlow", "Everhart", "Fennick", "Galloway", "Harrow", "Inverness", "Juniper", "Kestrel", "Lindqvist",
)  # fmt: skip
FINANCE = (
    "what is the share price of {}", "{} stock price now", "current price of {} shares", "how much does one {} share cost",
    "quote for {}", "how is {} trading today",
)  # fmt: skip
SUBJECTS = (
    "a tenant's notice period", "an employee's probation", "a will without witnesses", "a noisy neighbour", "a verbal contract",
    "a late delivery penalty", "a trademark renewal", "a shared driveway", "a security deposit", "a power of attorney",
    "a stolen bicycle claim", "a broken lease", "an unpaid invoice", "a dog that bites", "a copied photograph",
)  # fmt: skip
LEGAL = (
    "what does the law say about {}", "legal rules for {}", "I need legal advice on {}", "is there a law on {}",
    "what are my rights with {}", "explain the law of {}",
)  # fmt: skip
CHAT = (
    ("I forgot my password", "how do I reset my password", "my password does not work any more", "help me get a new password",
     "can't remember my login password", "change lost password please"),
    ("how can I cancel my subscription", "I want to stop my subscription", "please end my subscription",
     "unsubscribe me from the plan", "how to quit the paid plan", "I no longer want the subscription"),
    ("I want my money back", "how do I get a refund", "can I return this and be refunded", "refund my last order please",
     "where do I ask for a refund", "give me back what I paid"),
    ("when are you open", "what are your opening hours", "at what time do you open and close", "are you open on Sundays",
     "opening times please", "how late is the shop open"),
    ("where is my parcel", "when will my package arrive", "my order has not arrived yet", "track my delivery",
     "how long does shipping take for my order", "is my parcel on its way"),
    ("let me talk to a person", "I want a human agent", "connect me with an employee", "can I speak with someone real",
     "stop the bot and give me a person", "transfer me to customer service"),
    ("I moved, how do I change my address", "update my delivery address", "my address is wrong", "set a new home address",
     "edit the address of my account", "change where my orders go"),
    ("do you have a discount code", "any coupons right now", "is there a promotion today", "how do I get a lower price",
     "voucher for my first order", "are there special offers"),
    ("how do I delete my account", "remove my profile for good", "close my account please", "erase my data and account",
     "I want my account gone", "delete everything about me"),
    ("which payment methods do you take", "can I pay with a credit card", "do you accept bank transfer", "is cash possible",
     "how can I pay for my order", "ways to pay here"),
    ("the item arrived broken", "my product is damaged", "what I received does not work", "it was defective on arrival",
     "my order came in pieces", "the thing you sent is faulty"),
    ("do you ship abroad", "can I order from another country", "is international delivery possible", "do you deliver overseas",
     "shipping outside the country", "which countries do you send to"),
)  # fmt: skip


def category_queries() -> list[Query]:
    """Every query, six wordings of each intent: 40 intents of code, 12 of chat, 12 of finance, 15 of legal."""
    pairs = [(operation, language) for operation in OPERATIONS for language in LANGUAGES]
    wordings = {
        "code": [[form.format(*pair) for form in CODE] for pair in pairs],
        "chat": CHAT,
        "finance": [[form.format(name) for form in FINANCE] for name in COMPANIES],
        "legal": [[form.format(subject) for form in LEGAL] for subject in SUBJECTS],
    }
    return [
        Query(category, intent, wording, text)
        for category in CATEGORIES
        for intent, texts in enumerate(wordings[category])
        for wording, text in enumerate(texts)
    ]
