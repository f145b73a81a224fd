localrules:
    fetch,


rule fetch:
    output:
        f"{RESULTS}/models/{{id}}.json",
    log:
        f"{RESULTS}/logs/fetch/{{id}}.log",
    conda:
        "../../environment.yml"
    resources:
        disk_mb=asks("disk_mb"),
    priority: 10 # everything waits for it
    message:
        "fetch {wildcards.id}: {params.label}"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier fetch {wildcards.id} --results {params.results:q}"
        " >{log:q} 2>&1 || (tail -n 20 {log:q} >&2; exit 1)"
