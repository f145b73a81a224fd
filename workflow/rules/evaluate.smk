rule score:
    input:
        parents,
    output:
        f"{RESULTS}/scores/{{id}}.json",
    log:
        f"{RESULTS}/logs/score/{{id}}.log",
    conda:
        "../../environment.yml"
    group:
        pack
    resources:
        abreast=1, # of a pack: the profile says how many may run at once
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
        gpu=asks("gpu"),
        checkpoints=asks("checkpoints"), # temporary ones, which exist while their job runs
    message:
        "score {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier score {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"


rule speed:
    input:
        parents,
    output:
        f"{RESULTS}/speed/{{id}}.json",
    log:
        f"{RESULTS}/logs/speed/{{id}}.log",
    conda:
        "../../environment.yml"
    threads: workflow.resource_settings.cores or 1 # so that nothing runs beside it; None on a cluster
    resources:
        mem_mb=asks("mem_mb"),
        runtime=asks("runtime"),
        disk_mb=asks("disk_mb"),
        gpu=asks("gpu"),
    message:
        "speed {wildcards.id}: {params.label} ({resources.mem_mb} MB, {resources.runtime} min)"
    params:
        label=label,
        results=results_folder,
    shell:
        "python -m espalier speed {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"
