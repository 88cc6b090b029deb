#!/usr/bin/env python3
"""Renders conversations with the Jinja templates that the models ship with, the way transformers does (trim_blocks,
lstrip_blocks, raise_exception): make_templates.py OUT.json. A conversation that a template refuses is null.
Sources: tokenizer_config.json of Qwen1.5-0.5B (without its default system message), Meta-Llama-3-8B-Instruct,
Mistral-7B-Instruct-v0.2, gemma-2b-it; alpaca has no official template: the usual one with Stanford's headings."""
import json
import sys

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATES = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
              "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "llama3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = "
              "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
              "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
              "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
              "{% endif %}",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception("unknown role") }}
    {%- endif %}
{%- endfor %}
""",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
             "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}"
             "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role "
             "+ '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}"
             "{{'<start_of_turn>model\\n'}}{% endif %}",
    "alpaca": "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% set loop_messages = "
              "messages[1:] %}{% else %}{{ 'Below is an instruction that describes a task. Write a response that "
              "appropriately completes the request.\\n\\n' }}{% set loop_messages = messages %}{% endif %}"
              "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
              "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
              "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}"
              "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% else %}"
              "{{ raise_exception('unknown role') }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
              "{{ '### Response:\\n' }}{% endif %}",
}
TOKENS = {"chatml": ("", "<|im_end|>"), "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "mistral": ("<s>", "</s>"),
          "gemma": ("<bos>", "<eos>"), "alpaca": ("", "<EOS>")}
U, A, S = "user", "assistant", "system"
CONVERSATIONS = [
    [(U, "Hello")], [(U, "Hello"), (A, "Hi there")], [(S, "Be brief."), (U, "Hello"), (A, "Hi")],
    [(U, " a "), (A, "\n b \t"), (U, "c"), (A, "  d\u00a0\u2003")], [(U, ""), (A, "")],
    [(S, " s "), (U, "naïve 世界 🙂"), (A, "x\x1c"), (U, "\u200b y")], [(A, "first")], [(U, "a"), (U, "b")],
    [(U, "a"), (A, "b"), ("tool", "c")], [(S, "only")], [(U, "<|im_end|> </s>"), (A, "### Response:\n")],
]


def main():
    def raise_exception(message):
        raise TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.globals["raise_exception"] = raise_exception
    out = []
    for name, source in TEMPLATES.items():
        template = env.from_string(source)
        for conversation in CONVERSATIONS:
            messages = [{"role": r, "content": c} for r, c in conversation]
            for generation in (False, True):
                try:
                    text = template.render(messages=messages, add_generation_prompt=generation,
                                           bos_token=TOKENS[name][0], eos_token=TOKENS[name][1])
                except TemplateError:
                    text = None
                out.append({"template": name, "messages": messages, "generation": generation, "text": text})
    json.dump(out, open(sys.argv[1], "w", encoding="utf-8"), ensure_ascii=True, indent=0)


main()
