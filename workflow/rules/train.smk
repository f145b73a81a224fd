# Training. First what experiments ask for: what a method needs to be learnt, the original's answers to a tuning text,
# and the tuning of routers. Both trainings keep their state beside their output, so that a job that was stopped or
# killed goes on.


rule fit:
    input:
        parents,
    output:
        f"{RESULTS}/fits/{{id}}.safetensors",
    log:
        f"{RESULTS}/logs/fit/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
        gpu=asks("gpu"),
    message:
        "fit {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier fit {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


rule teacher:
    input:
        parents,
    output:
        f"{RESULTS}/teachers/{{id}}.safetensors",
    log:
        f"{RESULTS}/logs/teacher/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
        gpu=asks("gpu"),
    message:
        "teacher {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier teacher {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


rule tune:
    input:
        parents,
    output:
        directory(f"{RESULTS}/tuned/{{id}}"),
    log:
        f"{RESULTS}/logs/tune/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
        gpu=asks("gpu"),
    message:
        "tune {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier tune {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


# And training the embedded model again. Not part of any experiment: it takes about an hour on two cores and is not
# bit-stable over machines, so the trained model is committed, and these rules say how it was made:
#   snakemake --cores 2 results/embedded/model/model.safetensors
# The outputs are single files, written last: what a failed or killed job leaves beside them (downloads, the
# training's state) survives, and the next run continues from it.


rule corpora:
    output:
        f"{RESULTS}/corpora/manifest.json",
    log:
        f"{RESULTS}/logs/corpora.log",
    conda:
        "../../environment.yml"
    message:
        "corpora: download and split the four domains"
    params:
        directory=subpath(output[0], parent=True),
    shell:
        "python -m espalier.embedded.corpora --out {params.directory} >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


rule train_embedded:
    input:
        f"{RESULTS}/corpora/manifest.json",
    output:
        f"{RESULTS}/embedded/model/model.safetensors",
    log:
        f"{RESULTS}/logs/train_embedded.log",
    conda:
        "../../environment.yml"
    threads: 2
    message:
        "train_embedded: {params.steps} steps"
    params:
        corpora=subpath(input[0], parent=True),
        directory=subpath(output[0], ancestor=2),
        steps=config["train_steps"],
        options=config["train_options"],
    shell:
        "python -m espalier.embedded.train --corpora {params.corpora} --out {params.directory}"
        " --steps {params.steps} --threads {threads} {params.options}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"
