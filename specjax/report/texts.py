"""All texts of the report, in English and in French."""

from collections.abc import Mapping

LANGUAGES = ("en", "fr")

# key -> (English, French)
TEXT: Mapping[str, tuple[str, str]] = {
    "title": ("Which method: full, SFT or LoRA", "Quelle méthode : affinage complet, SFT ou LoRA"),
    "over": ("specjax · comparison of methods", "specjax · comparaison de méthodes"),
    # The summary.
    "take": ("Take {method} at {rate}: {reasons}.", "Prenez {method} à {rate} : {reasons}."),
    "take plainly": ("Take {method}: {reasons}.", "Prenez {method} : {reasons}."),
    "take bare": ("Take {method}.", "Prenez {method}."),
    "and": ("and", "et"),
    "lowest": (
        "its loss on held-out rows is the lowest, {loss} per token",
        "sa perte sur les lignes mises de côté est la plus basse, {loss} par token",
    ),
    "equal": ("as good as {other}", "aussi bon que {other}"),
    "within": ("within {apart} of {other}", "à {apart} de {other}"),
    "forgets part": ("it forgets {part} of what {other} forgets", "il oublie {part} de ce qu’oublie {other}"),
    "forgets as much": ("it forgets as much as {other}", "il oublie autant que {other}"),
    "forgets times": ("it forgets {times} times what {other} forgets", "il oublie {times} fois ce qu’oublie {other}"),
    "forgets nats": ("it forgets {nats} of {name}", "il oublie {nats} sur {name}"),
    "forgets nothing": ("it forgets nothing of {name}", "il n’oublie rien de {name}"),
    "fits": ("it fits {hardware} at the size of {model}", "il tient sur {hardware} à la taille de {model}"),
    "either": ("{one} or {other}", "{one} ou {other}"),
    "the target": ("the target model", "le modèle visé"),
    "needs": ("it needs {memory} here", "il demande {memory} ici"),
    "no method": ("No method can be recommended.", "Aucune méthode ne peut être conseillée."),
    "none done": (
        "No method came to its end; the reasons are below.",
        "Aucune méthode n’est allée au bout ; les raisons sont plus bas.",
    ),
    "a third": ("a third", "un tiers"),
    "half": ("half", "la moitié"),
    "a quarter": ("a quarter", "un quart"),
    "two thirds": ("two thirds", "les deux tiers"),
    "three quarters": ("three quarters", "les trois quarts"),
    "a tenth": ("a tenth", "un dixième"),
    "a fifth": ("a fifth", "un cinquième"),
    # How sure it is.
    "sure one seed": (
        "One seed: there is no interval, and a small difference may be chance.",
        "Une seule graine : il n’y a pas d’intervalle, et un petit écart peut être dû au hasard.",
    ),
    "sure inside": (
        "The 95 % intervals of {one} and {other} over {seeds} seeds overlap: they cannot be told apart here.",
        "Les intervalles à 95 % de {one} et de {other} sur {seeds} graines se recouvrent : rien ne les départage ici.",
    ),
    "sure outside": (
        "The 95 % intervals of {one} and {other} over {seeds} seeds do not overlap.",
        "Les intervalles à 95 % de {one} et de {other} sur {seeds} graines ne se recouvrent pas.",
    ),
    "measured on": (
        "Measured on {rows} held-out rows, {steps} steps of {tokens} tokens per method.",
        "Mesuré sur {rows} lignes mises de côté, {steps} pas de {tokens} tokens par méthode.",
    ),
    "other rows": (
        "The methods start from different losses: they are measured on different rows, so their losses are not one "
        "scale.",
        "Les méthodes partent de pertes différentes : mesurées sur d’autres lignes, leurs pertes ne sont pas sur une "
        "même échelle.",
    ),
    "split taken": (
        "The held-out rows were split off your data.",
        "Les lignes mises de côté ont été prises dans vos données.",
    ),
    # The table.
    "methods": ("The methods", "Les méthodes"),
    "methods note": (
        "Each at the best of the rates that were tried. Losses are in nats per token: less is better.",
        "Chacune au meilleur des taux d’apprentissage essayés. Les pertes sont en nats par token : moins vaut mieux.",
    ),
    "rise": ("A rise on {names} is forgetting.", "Une hausse sur {names} est un oubli."),
    "method": ("Method", "Méthode"),
    "complexity": ("Complexity", "Complexité"),
    "data": ("Data", "Données"),
    "cost": ("Cost", "Coût"),
    "local": ("Usable locally", "Utilisable en local"),
    "quality": ("Quality", "Qualité"),
    "best": ("recommended", "conseillée"),
    "rate": ("rate {rate}", "taux {rate}"),
    "alpha": ("alpha {alpha}", "alpha {alpha}"),
    "trained": ("parameters train", "param. entraînés"),
    "of total": ("{share} of {total}", "{share} de {total}"),
    "tried": ("{count} runs, {rates} rates", "{count} essais, {rates} taux"),
    "tried seeds": ("{count} runs, 1 rate", "{count} essais, 1 taux"),
    "tried one": ("1 run", "1 essai"),
    "tokens seen": ("{tokens} tokens seen", "{tokens} tokens vus"),
    "rows read": ("{rows} rows", "{rows} lignes"),
    "rows text": ("{rows} texts", "{rows} textes"),
    "rows pairs": ("{rows} pairs", "{rows} paires"),
    "rows chats": ("{rows} conversations", "{rows} conversations"),
    "rows preference": ("{rows} preferences", "{rows} préférences"),
    "in the loss": ("{tokens} loss tokens", "{tokens} tokens comptés"),
    "speed": ("{speed} tokens/s", "{speed} tokens/s"),
    "compile": ("+ {time} compile", "+ {time} compil."),
    "in fleet": ("share of a fleet", "part d’une flotte"),
    "saved": ("{size} saved", "{size} écrits"),
    "yes": ("yes", "oui"),
    "no": ("no", "non"),
    "of memory": ("{peak} of {memory}", "{peak} sur {memory}"),
    "peak": ("{peak} at most", "{peak} au plus"),
    "fleet memory": ("the fleet’s peak", "pic de la flotte"),
    "loss from": ("loss, from {before}", "perte, avant {before}"),
    "loss": ("loss", "perte"),
    "interval": ("{low} to {high}, 95 %", "{low} à {high}, 95 %"),
    "accuracy": ("accuracy {value}", "justesse {value}"),
    "exact": ("exact {value}", "exactes {value}"),
    "chrf": ("chrF {value}", "chrF {value}"),
    "rouge_l": ("ROUGE-L {value}", "ROUGE-L {value}"),
    "forgets": ("{name} {change}", "{name} {change}"),
    "not measured": ("not measured", "non mesuré"),
    "status failed": ("failed", "échec"),
    "status too_large": ("does not fit", "ne tient pas"),
    "status skipped": ("skipped", "ignorée"),
    # The curves.
    "curves": ("Curves", "Courbes"),
    "curves note": (
        "Each method at its best rate; a band is what its seeds span. Hold the pointer over a line to read it.",
        "Chaque méthode à son meilleur taux ; une bande couvre ses graines. "
        "Laissez le pointeur sur une courbe pour la lire.",
    ),
    "no matplotlib": (
        "The curves are missing: matplotlib is not installed. pip install 'specjax[report]', then: "
        "specjax report --workdir=DIR",
        "Les courbes manquent : matplotlib n’est pas installé. pip install 'specjax[report]', puis : "
        "specjax report --workdir=DIR",
    ),
    "no curves": ("No method left a curve.", "Aucune méthode n’a laissé de courbe."),
    "figure steps": ("Loss on {name} over steps", "Perte sur {name} au fil des pas"),
    "figure rates": ("Loss on {name} by rate", "Perte sur {name} selon le taux"),
    "figure trade": ("Learned against forgotten on {name}", "Appris et oublié, sur {name}"),
    "caption domain": (
        "Held-out rows of your data. Lower is better.",
        "Lignes de vos données mises de côté. Plus bas vaut mieux.",
    ),
    "caption general": (
        "What the base could do before. A rise is forgetting.",
        "Ce que la base savait faire avant. Une hausse est un oubli.",
    ),
    "caption rates": (
        "At each run’s best step. The large mark is a method’s best rate; hollow ones were stopped on the way. "
        "Rates that end above the base’s loss are left out.",
        "Au meilleur pas de chaque essai. La grande marque est le meilleur taux d’une méthode ; les creuses ont été "
        "arrêtées en route. Les taux qui finissent au-dessus de la perte de la base sont laissés de côté.",
    ),
    "caption trade": (
        "One path per method, from the base at the origin. Right is learned, up is forgotten: low and to the right is "
        "better. The mark is the step that was kept, small ones are where other rates ended; those far outside are "
        "left out.",
        "Un chemin par méthode, depuis la base à l’origine. À droite, l’appris ; en haut, l’oublié : mieux vaut bas et "
        "à droite. La marque est le pas gardé, les petites sont les fins des autres taux ; celles qui sont loin dehors "
        "sont laissées de côté.",
    ),
    "axis steps": ("steps", "pas"),
    "axis loss": ("loss, nats per token", "perte, nats par token"),
    "axis rate": ("learning rate", "taux d’apprentissage"),
    "axis learned": ("learned, nats per token", "appris, nats par token"),
    "axis forgotten": ("forgotten, nats per token", "oublié, nats par token"),
    "base": ("base", "base"),
    "said of end": ("{label}: {value} at step {step}", "{label} : {value} au pas {step}"),
    "said of rate": ("{label}: {value} at {rate}", "{label} : {value} à {rate}"),
    "said of trade": ("{label}: learned {learned}, forgot {forgot}", "{label} : appris {learned}, oublié {forgot}"),
    # The answers.
    "answers": ("Answers", "Réponses"),
    "answers note": (
        "Marked words differ from the expected answer, or from the base’s where none is known.",
        "Les mots marqués diffèrent de la réponse attendue ou, à défaut, de celle de la base.",
    ),
    "expected": ("expected", "attendu"),
    "the base": ("base, before training", "base, avant entraînement"),
    "ends at once": ("(ends at once)", "(s’arrête aussitôt)"),
    "cut": ("… {count} more characters", "… encore {count} caractères"),
    "no answers": ("No prompt was asked.", "Aucune question n’a été posée."),
    "further answers": ("{count} more prompts", "{count} autres questions"),
    "more answers": ("{count} more prompts are in report.json.", "{count} autres questions sont dans report.json."),
    # The data.
    "your data": ("The data", "Les données"),
    "kind": ("kind", "genre"),
    "kind pairs": ("pairs of instruction and response", "paires question-réponse"),
    "kind text": ("raw text", "texte brut"),
    "kind chats": ("conversations", "conversations"),
    "kind preference": ("preference pairs", "paires de préférence"),
    "kind mixed": ("several kinds", "plusieurs genres"),
    "source": ("source", "source"),
    "rows": ("rows", "lignes"),
    "held out": ("held out", "mises de côté"),
    "given": ("{rows}, given", "{rows}, fournies"),
    "taken": ("{rows}, split off", "{rows}, prises dans les données"),
    "loss tokens": ("tokens in the loss", "tokens comptés dans la perte"),
    "length": ("length of a row", "longueur d’une ligne"),
    "tokens": ("{count} tokens", "{count} tokens"),
    "cut share": ("cut by the length", "coupés par la longueur"),
    "general": ("forgetting measured on", "oubli mesuré sur"),
    "general set": ("{name}, {rows} rows", "{name}, {rows} lignes"),
    "shipped": ("shipped with specjax", "fourni avec specjax"),
    "mask": ("A row as the model sees it", "Une ligne telle que le modèle la voit"),
    "counted": ("counts in the loss", "compte dans la perte"),
    "not counted": ("read, not counted", "lu, non compté"),
    "no example": ("No row was kept as an example.", "Aucune ligne n’a été gardée en exemple."),
    # Hardware.
    "hardware": ("On {model}", "Sur {model}"),
    "hardware note": (
        "The smallest of each kind that the method fits by the planner’s estimate, for {parameters} parameters, and "
        "the time that the operations take at the chips’ peak, below which no run is; nothing ran there.",
        "Le plus petit matériel de chaque sorte où la méthode tient d’après l’estimation du planificateur, "
        "pour {parameters} de paramètres, et le temps des opérations à la crête des puces, que rien ne peut battre ; "
        "rien n’y a tourné.",
    ),
    "tpu": ("TPU slice", "Tranche de TPU"),
    "gpu": ("GPUs", "GPU"),
    "per chip": ("{size} per chip", "{size} par puce"),
    "least time": ("a million tokens take at least {time}", "un million de tokens prend au moins {time}"),
    "least cost": ("and cost at least {cost}", "et coûte au moins {cost}"),
    "fits none": ("none that was tried", "aucun de ceux essayés"),
    # What failed, and what to do next.
    "failed": ("What did not finish", "Ce qui n’est pas allé au bout"),
    "no reason": ("no reason was written", "aucune raison notée"),
    "commands": ("Again, and on", "Refaire, et poursuivre"),
    "commands note": (
        "What trains each method’s run anew, and asks its result; the config is the one to go on with.",
        "De quoi refaire l’entraînement de chaque méthode et interroger son résultat ; la configuration est celle avec "
        "laquelle poursuivre.",
    ),
    "config": ("config", "configuration"),
    "folder": ("result", "résultat"),
    # The foot.
    "grid": (
        "grid of rates: rule “{source}” of specjax advise --explain",
        "grille des taux : règle « {source} » de specjax advise --explain",
    ),
    "of seeds": ("{seeds} seeds", "{seeds} graines"),
    "seeds": ("seeds {seeds}", "graines {seeds}"),
    "full": ("full fine-tuning", "affinage complet"),
    "full in prose": ("full fine-tuning", "l’affinage complet"),
    "full short": ("full", "complet"),
}
