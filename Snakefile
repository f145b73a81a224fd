# The pipeline: tokens, collect, plan, apply, score, table, report. Run it with `espalier run EXPERIMENT`, or:
#   snakemake --profile workflow/profiles/default --cores 2 --config 'experiments=[demo]'
configfile: f"{workflow.basedir}/workflow/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/fetch.smk"
include: "workflow/rules/compress.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


rule all:
    default_target: True
    input:
        reports,
