// Perplexity and greedy tokens of a GGUF file by llama.cpp, through node-llama-cpp's prebuilt CPU library.
// Usage: node llamacpp.mjs FILE.gguf TOKENS.json; TOKENS.json: {"blocks": [[...]], "prompts": [[...]], "new": 16}.
// Prints {"nll": mean negative log-likelihood of a token in nats, "tokens": [[...]]}.
import fs from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [file, given] = process.argv.slice(2);
const {blocks, prompts, new: count} = JSON.parse(fs.readFileSync(given, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: 2});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: 512, flashAttention: false});
const sequence = context.getSequence();

let total = 0;
let tokens = 0;
for (const block of blocks) {
    await sequence.clearHistory();
    const input = block.map((token, at) => at + 1 < block.length
        ? [token, {generateNext: {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}}}]
        : token);
    const results = await sequence.controlledEvaluate(input);
    for (let at = 0; at + 1 < block.length; at++) {
        const chance = results[at].next.probabilities.get(block[at + 1]);
        if (chance === undefined) throw new Error(`token ${block[at + 1]} has no probability`);
        total -= Math.log(chance);
        tokens++;
    }
}

const made = [];
for (const prompt of prompts) {
    await sequence.clearHistory();
    const found = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        found.push(token);
        if (found.length === count) break;
    }
    made.push(found);
}
console.log(JSON.stringify({nll: total / tokens, tokens: made}));
await context.dispose();
await model.dispose();
process.exit(0);
