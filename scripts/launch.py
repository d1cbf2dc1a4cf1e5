"""The command line of training: ``main(default_config)`` reads ``key=value`` arguments and runs one training,
or the stages of a pipeline.
"""

import os
import sys

from utils.cli import run_main

USAGE = """\
{doc}

usage: python scripts/{script} [config=FILE] [key=value ...]        one process
       bash run_train.sh scripts/{script} [GPUS] [PORT] [DEVICES] [RUN_NAME] [key=value ...]
       {script} --help      this text; with config=FILE for another config than {config}
"""


def main(default_config: str, doc: str) -> None:
    """Entry point of ``scripts/train_*.py``.

    Args:
        default_config: config that runs when the command line names none.
        doc: the script's docstring, printed by ``--help``.
    """
    run_main(lambda: _main(default_config, doc, sys.argv[1:]))


def _main(default_config: str, doc: str, arguments: list[str]) -> None:
    from engine.config.load import load_config

    configs = [item.removeprefix("config=") for item in arguments if item.startswith("config=")]
    config = configs[-1] if configs else default_config
    overrides = [item for item in arguments if not item.startswith("config=")]
    if {"-h", "--help"} & set(overrides):
        from engine.config.help import describe

        script = os.path.basename(sys.argv[0])
        print(USAGE.format(doc=doc.strip(), script=script, config=default_config))
        print(describe(config, [item for item in overrides if not item.startswith("-")]))
        return
    cfg = load_config(config, overrides)
    if scenes := [item for item in overrides if item.startswith("data.generate")]:
        raise ValueError(f"{scenes[0]} changes no images: draw others with tools/make_demo_data.py")

    from engine.train import run
    from utils.distributed import shutdown

    try:
        if cfg.stages:
            from engine.pipeline import runner

            runner.run(config, overrides)
        else:
            run(cfg)
    finally:
        shutdown()
