localrules:
    fetch,


rule fetch:
    output:
        RESULTS + "/models/{id}.json",
    log:
        RESULTS + "/logs/fetch/{id}.log",
    conda:
        "../../environment.yml"
    message:
        "fetch {wildcards.id}: {params.label}"
    params:
        label=label,
        results=RESULTS,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier fetch {wildcards.id} --results {params.results}"
        " >{log} 2>&1 || (tail -n 20 {log} >&2; exit 1)"
