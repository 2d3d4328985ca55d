"""lm-eval's command, of which rank 1 raises in the middle of the evaluation."""

import os
import sys
import time
from typing import Any

from spd.harness import SpdLM
from spd.lm_eval_cli import main

if __name__ == "__main__":
    generate, calls = SpdLM._model_generate, []

    def third_call_raises(self: SpdLM, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            print(f"rank 1 raises at {time.time()}", file=sys.stderr, flush=True)
            raise ArithmeticError("rank 1 cannot go on")
        return generate(self, *args, **options)

    SpdLM._model_generate = third_call_raises
    main()
