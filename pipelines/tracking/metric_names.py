"""Names of metrics of each class, as MLflow takes them."""

import itertools
import re
from collections.abc import Sequence

LONGEST = 200
"""Characters of a class's name that are kept; MLflow allows a metric's name 250."""


def class_metric_names(prefix: str, classes: Sequence[str]) -> list[str]:
    """``<prefix>/<class name>`` for each class, no two alike.

    What MLflow does not allow in a name becomes ``_``. A name that an earlier class has already gets the id of its
    class; case does not count, because some databases ignore it.
    """
    names: dict[str, str] = {}  # by their small letters
    for index, name in enumerate(classes):
        plain = re.sub(r"[^\w .-]", "_", name)[:LONGEST].strip(" .") or "class"
        numbered = (f"{plain}_{number}" for number in itertools.count(index))
        unique = next(found for found in itertools.chain([plain], numbered) if found.casefold() not in names)
        names[unique.casefold()] = f"{prefix}/{unique}"
    return list(names.values())
