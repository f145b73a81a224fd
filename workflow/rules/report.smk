localrules:
    table,
    report,


rule table:
    input:
        parents,
    output:
        f"{RESULTS}/tables/{{id}}.json",
    log:
        f"{RESULTS}/logs/table/{{id}}.log",
    conda:
        "../../environment.yml"
    message:
        "table {wildcards.id}: {params.label}"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier table {wildcards.id} --results {params.results}"
        " >{log} 2>&1 || (tail -n 20 {log} >&2; exit 1)"


rule report:
    input:
        parents,
    output:
        f"{RESULTS}/reports/{{id}}.html",
    log:
        f"{RESULTS}/logs/report/{{id}}.log",
    conda:
        "../../environment.yml"
    message:
        "report {wildcards.id}: {params.label}"
    params:
        label=label,
        results=results_folder,
    shell:
        "OMP_NUM_THREADS={threads} python -m espalier report {wildcards.id} --results {params.results}"
        " >{log} 2>&1 || (tail -n 20 {log} >&2; exit 1)"
