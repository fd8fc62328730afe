"""Keeps: capitals that a model knows are kept while others are edited.

    python -m tests.benchmarks.keeps --model DIR [--text FILE] [-n 50] [--set SETTING=VALUE ...] [--threads 1]

The model is asked "The capital of X is" for every country below. Of those whose capital it says at once, shuffled with seed 0, the first n
get the capital of another of them, and the next n are kept (`commit --keep`); what is left was neither edited nor kept. Printed for the
edit without keeps and with them: how many new facts are said and closed, and of the kept and of the others how many say the same capital as
before, and how many now say one of the new targets.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any, Final

import torch
from transformers import AutoTokenizer

import patchhub
from patchhub.evaluation.live import continue_greedily
from patchhub.evaluation.suites import closed, said

PROMPT: Final = "The capital of {} is"
TOKENS: Final = 12

_CAPITALS: Final = """
Afghanistan:Kabul Albania:Tirana Algeria:Algiers Angola:Luanda Argentina:Buenos_Aires Armenia:Yerevan Australia:Canberra
Austria:Vienna Azerbaijan:Baku Bahrain:Manama Bangladesh:Dhaka Belarus:Minsk Belgium:Brussels Bhutan:Thimphu
Bolivia:La_Paz Botswana:Gaborone Bulgaria:Sofia Cambodia:Phnom_Penh Canada:Ottawa Chad:N'Djamena Chile:Santiago
China:Beijing Colombia:Bogotá Costa_Rica:San_José Croatia:Zagreb Cuba:Havana Cyprus:Nicosia Denmark:Copenhagen
Ecuador:Quito Egypt:Cairo Eritrea:Asmara Estonia:Tallinn Ethiopia:Addis_Ababa Fiji:Suva Finland:Helsinki France:Paris
Gabon:Libreville Georgia:Tbilisi Germany:Berlin Ghana:Accra Greece:Athens Guinea:Conakry Guyana:Georgetown
Haiti:Port-au-Prince Honduras:Tegucigalpa Hungary:Budapest Iceland:Reykjavik India:New_Delhi Indonesia:Jakarta
Iran:Tehran Iraq:Baghdad Ireland:Dublin Israel:Jerusalem Italy:Rome Jamaica:Kingston Japan:Tokyo Jordan:Amman
Kenya:Nairobi Kyrgyzstan:Bishkek Laos:Vientiane Latvia:Riga Lebanon:Beirut Liberia:Monrovia Libya:Tripoli
Lithuania:Vilnius Madagascar:Antananarivo Malawi:Lilongwe Malaysia:Kuala_Lumpur Maldives:Malé Mali:Bamako Malta:Valletta
Mauritania:Nouakchott Mauritius:Port_Louis Moldova:Chisinau Mongolia:Ulaanbaatar Montenegro:Podgorica Morocco:Rabat
Mozambique:Maputo Namibia:Windhoek Nepal:Kathmandu New_Zealand:Wellington Nicaragua:Managua Niger:Niamey Nigeria:Abuja
North_Korea:Pyongyang Norway:Oslo Oman:Muscat Pakistan:Islamabad Paraguay:Asunción Peru:Lima Poland:Warsaw
Portugal:Lisbon Qatar:Doha Romania:Bucharest Russia:Moscow Rwanda:Kigali Saudi_Arabia:Riyadh Senegal:Dakar
Serbia:Belgrade Sierra_Leone:Freetown Slovakia:Bratislava Slovenia:Ljubljana Somalia:Mogadishu South_Korea:Seoul
Spain:Madrid Sudan:Khartoum Sweden:Stockholm Switzerland:Bern Syria:Damascus Taiwan:Taipei Tajikistan:Dushanbe
Tanzania:Dodoma Thailand:Bangkok Togo:Lomé Tunisia:Tunis Turkey:Ankara Turkmenistan:Ashgabat Uganda:Kampala Ukraine:Kyiv
Uruguay:Montevideo Uzbekistan:Tashkent Venezuela:Caracas Vietnam:Hanoi Yemen:Sanaa Zambia:Lusaka Zimbabwe:Harare
"""
"""Countries and their capitals; an underscore is a space."""


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        repo = patchhub.Repository.init(Path(folder), options.model)
        if options.text:
            repo.metric_compute(text=[options.text])
        tokenizer, model = AutoTokenizer.from_pretrained(options.model), repo.load("base", dtype=torch.float32)
        capitals = dict(pair.replace("_", " ").split(":") for pair in _CAPITALS.split())
        before = _asked(model, tokenizer, list(capitals))
        known = [name for name in capitals if said(before[name], capitals[name])]
        random.Random(0).shuffle(known)
        count = min(options.n, len(known) // 2)
        edited, kept, others = known[:count], known[count : 2 * count], known[2 * count :]
        targets = {name: capitals[edited[(place + 1) % count]] for place, name in enumerate(edited)}
        print(
            f"{len(known)} of {len(capitals)} capitals are known; {count} edited, {count} kept, {len(others)} neither"
        )
        for keep in (None, [{"prompt": PROMPT, "subject": name} for name in kept]):
            repo.switch("with" if keep else "without", "base", create=True)
            begun = process_time()
            facts = [_fact(name, targets[name], capitals[name]) for name in edited]
            made = repo.commit(facts, message="capitals", keep=keep, force=True, set=options.set)
            spent = process_time() - begun
            repo.attach(model, made.commit)
            after = _asked(model, tokenizer, known)
            repo.attach(model, "base")
            print("with keeps" if keep else "without keeps", f"({spent:.0f} CPU s)")
            right = sum(said(after[name], targets[name]) for name in edited)
            ended = sum(closed(after[name], targets[name]) for name in edited)
            print(f"  edited: said {right} of {count}, closed {ended}")
            for what, names in (("kept", kept), ("neither", others)):
                _tell(what, names, capitals, after, sorted(set(targets.values())))


def _fact(name: str, target: str, true: str) -> dict[str, str]:
    return {"prompt": PROMPT, "subject": name, "target_new": target, "target_true": true}


def _asked(model: Any, tokenizer: Any, names: Sequence[str]) -> dict[str, str]:
    """What the model writes after the prompt about each."""
    prompts = [PROMPT.replace("{}", name) for name in names]
    return dict(zip(names, continue_greedily(model, tokenizer, prompts, max_new_tokens=TOKENS), strict=True))


def _tell(
    what: str, names: Sequence[str], capitals: dict[str, str], after: dict[str, str], targets: Sequence[str]
) -> None:
    same = sum(said(after[name], capitals[name]) for name in names)
    leaking = sum(
        any(said(after[name], target) for target in targets if target != capitals[name])
        and not said(after[name], capitals[name])
        for name in names
    )
    print(f"  {what}: as before {same} of {len(names)}, say a new target {leaking}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path)
    parser.add_argument("-n", type=int, default=50)
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
