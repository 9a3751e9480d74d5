"""``python -m atp_utils.models NAME``: have a model ready before it is needed; an embedded one is fetched and made."""

import sys

from atp_utils import models, shown

if __name__ == "__main__":
    try:
        print("model:", shown(models.locate(" ".join(sys.argv[1:]) or models.EMBEDDED)))
    except (ValueError, OSError, MemoryError) as error:
        sys.exit(f"error: {error}")
