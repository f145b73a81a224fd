localrules:
    tokens, # it may read a data set of the hub


rule tokens:
    input:
        parents,
    output:
        f"{RESULTS}/tokens/{{id}}.safetensors",
    log:
        f"{RESULTS}/logs/tokens/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
    priority: 10 # everything waits for it
    message:
        "tokens {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier tokens {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


rule collect:
    input:
        parents,
    output:
        f"{RESULTS}/stats/{{id}}.safetensors",
    log:
        f"{RESULTS}/logs/collect/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: 1 # more for large models on a processor: --set-threads collect=16
    resources:
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
        gpu=asks("gpu"),
    priority: 10 # everything waits for it
    message:
        "collect {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier collect {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


rule reduce:
    input:
        parents,
    output:
        f"{RESULTS}/reduced/{{id}}.safetensors",
    log:
        f"{RESULTS}/logs/reduce/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
    priority: 10 # everything waits for it
    message:
        "reduce {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier reduce {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


rule plan:
    input:
        parents,
    output:
        f"{RESULTS}/plans/{{id}}.json",
    log:
        f"{RESULTS}/logs/plan/{{id}}.log",
    conda:
        "../../environment.yml"
    group:
        pack
    resources:
        abreast=1, # of a pack: the profile says how many may run at once
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
        gpu=asks("gpu"), # where the plan is made while the model runs
    message:
        "plan {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier plan {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


rule apply:
    input:
        parents,
    output:
        directory(f"{RESULTS}/checkpoints/{{id}}"),
    log:
        f"{RESULTS}/logs/apply/{{id}}.log",
    conda:
        "../../environment.yml"
    group:
        pack
    resources:
        abreast=1, # of a pack: the profile says how many may run at once
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
    message:
        "apply {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier apply {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"
