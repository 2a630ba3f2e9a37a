"""A small shop: orders and their jobs live in one database and change in one transaction.

`models` has the shop's own tables, `tasks` what happens to an order after it was placed, `__main__` the requests.
"""
