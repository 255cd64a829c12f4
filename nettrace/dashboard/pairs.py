"""Which quantities are seen against each other."""

#: What is between the names of two such, the vertical one first.
AGAINST = " against "
#: The horizontal and the vertical quantity of portraits.
PORTRAITS = (
    ("ntk/trace", "ntk/entropy"),
    ("fisher/trace", "ntk/entropy"),
    ("fisher/trace", "loss/mean"),
)
FLATNESS = f"weights/variance{AGAINST}weights/flatness"
