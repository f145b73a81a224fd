# Training the embedded model again. Not part of any experiment: it takes about an hour on two cores and is not
# bit-stable over machines, so the trained model is committed, and these rules say how it was made:
#   snakemake --cores 2 --config train_steps=4500 -- results/embedded


rule corpora:
    output:
        directory(f"{RESULTS}/corpora"),
    log:
        f"{RESULTS}/logs/corpora.log",
    conda:
        "../../environment.yml"
    message:
        "corpora: download and split the four domains"
    shell:
        "python -m espalier.embedded.corpora --out {output} >{log} 2>&1 || (tail -n 20 {log} >&2; exit 1)"


rule train_embedded:
    input:
        f"{RESULTS}/corpora",
    output:
        directory(f"{RESULTS}/embedded"),
    log:
        f"{RESULTS}/logs/train_embedded.log",
    conda:
        "../../environment.yml"
    threads: 2
    message:
        "train_embedded: {params.steps} steps"
    params:
        steps=config["train_steps"],
    shell:
        "python -m espalier.embedded.train --corpora {input} --out {output} --steps {params.steps}"
        " --threads {threads} >{log} 2>&1 || (tail -n 20 {log} >&2; exit 1)"
