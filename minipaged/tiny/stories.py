"""Short stories from a grammar.

A story is a list of *beats*.  Every beat has several wordings, and all of them draw on one set of slots
(hero, friend, place, thing, ...) that is filled once per story.  That is why names and pronouns stay
consistent while two stories are hardly ever the same.
"""

from __future__ import annotations

import random
import re
from typing import NamedTuple

# name lists by pronoun, so that a name never changes sides
NAMES = {
    "he": "Tom Ben Leo Max Finn Oscar Hugo Noah Emil Jack Sam Otto Milo Felix Theo Arlo Ravi Kofi Ivan Pablo "
          "Jonas Nils Omar Luca".split(),
    "she": "Anna Lily Mia Rosa Clara Nora Ella Ida Ruby Maya Zoe Lena Alma Wanda Priya Amina Sofia Greta Hana "
           "Ines Tilda Vera June Yuki".split(),
}
ANIMALS = ("fox rabbit bear mouse hedgehog squirrel cat dog owl duck frog goat turtle beaver badger crow "
           "otter donkey hen wolf lion elephant penguin cow tiger horse monkey pig "
           "sheep swan snail").split()
PEOPLE_HE = ["boy", "fisherman", "baker", "shepherd", "sailor", "gardener", "tailor", "clockmaker", "farmer",
             "painter", "old man", "postman", "blacksmith", "king"]
PEOPLE_SHE = ["girl", "baker", "painter", "gardener", "librarian", "pilot", "miller", "weaver", "teacher",
              "old woman", "doctor", "queen", "farmer", "sailor", "princess", "witch"]
WONDERS = ["robot", "robot", "dragon", "giant", "ghost", "wizard", "troll", "knight", "pirate", "snowman", "dwarf"]
SUBJECTS = sorted({*ANIMALS, *PEOPLE_HE, *PEOPLE_SHE, *WONDERS})

PRONOUNS = {"he": ("he", "him", "his"), "she": ("she", "her", "her")}
TRAITS = ["small", "brave", "curious", "shy", "clever", "lazy", "kind", "proud", "quiet", "cheerful", "lonely",
          "young", "friendly", "careful", "stubborn", "gentle", "poor", "hungry"]
HOMES = ["in a small town by the sea", "at the edge of a dark forest", "in a village between two hills",
         "in a little house near the river", "on a green island", "in an old mill", "under a tall oak tree",
         "in a valley full of flowers", "high up in the mountains", "in a busy city", "near a quiet lake",
         "at the end of a long road", "behind the old castle", "in a cabin in the snow",
         "in a tower with a red roof", "next to a wide field"]
PLACES = ["the forest", "the old castle", "the market", "the river", "the beach", "the hill", "the harbour",
          "the mill", "the garden", "the cave", "the meadow", "the station", "the bridge", "the lighthouse"]
THINGS = ["golden key", "red kite", "silver bell", "little lamp", "old map", "blue hat", "wooden flute",
          "glass ball", "brass clock", "green scarf", "small drum", "paper boat", "music box", "copper coin",
          "white shell", "warm coat", "shiny stone", "book of songs"]
FOODS = ["apples", "bread", "soup", "honey cake", "berries", "cheese", "nuts", "pancakes", "pears", "cookies",
         "carrots", "plum pie"]
DISHES = ["soup", "honey cake", "pancakes", "plum pie", "bread", "cookies", "tomato soup", "nut cake"]
SPOTS = ["under the bed", "behind the door", "in the garden", "under the stairs", "in the tall grass",
         "behind the well", "in the barn", "between the stones", "near the pond", "on the roof",
         "in the kitchen", "by the gate"]
BUILDS = ["boat", "bridge", "tree house", "cart", "windmill", "kite", "tower", "clock", "raft", "garden wall",
          "bird house", "sledge"]
TIMES = ["One morning", "One day", "One evening", "One cold day", "On a sunny day", "One spring morning",
         "One summer day", "Early one morning", "One rainy afternoon", "Late one night", "On a windy day",
         "One Sunday", "One autumn day", "One winter morning"]
FEARS = ["the dark", "deep water", "thunder", "high places", "the big dog next door", "strangers",
         "the wind at night", "the old well", "loud noises"]
MORALS = {
    "lost thing": ["four eyes see more than two", "it is wise to ask", "what is lost can be found again",
                   "a friend is worth more than gold"],
    "building": ["good work needs time", "two heads are better than one", "it is never too late to try again"],
    "fear": ["being brave does not mean having no fear", "a brave heart can be small",
             "fear grows smaller when we help others"],
    "stranger": ["a small kindness is never lost", "what we give comes back to us", "help can come from anywhere"],
    "race": ["it is better to be kind than to be fast", "winning together is best", "the proud fall first"],
    "noise": ["most ghosts are only friends we do not know", "a little light drives away a great fear",
              "it is good to look before you run"],
    "wish": ["a long road begins with one step", "dreams are worth a journey", "the best journeys are shared"],
    "trick": ["what we share grows larger", "a clever word is stronger than a fist",
              "bread tastes better when it is shared"],
    "storm": ["a good neighbour is a great treasure", "after every storm comes the sun",
              "courage is to go when others stay"],
    "library": ["order does not need a straight line", "a small card can save a large shelf"],
    "hotel": ["waiting is not the end", "a fair rule helps everybody", "there is room for all, but not always at once"],
    "lockers": ["many small places are as good as one large place", "a good list is half the work"],
    "recipe": ["we can share almost everything", "it is enough to copy what you change"],
    "seed": ["patience is stronger than force", "great things begin small", "good things need time"],
    "birthday": ["nobody is forgotten who has friends", "the best gift is a friend"],
    "song": ["every voice is good for something", "listening is half of making music"],
    "letter": ["a kind word can travel far", "it is never too late to say sorry"],
    "star": ["what we love must be free", "a good deed shines in the dark"],
    "teacher": ["mistakes are good teachers", "to learn is to try again", "nobody is born a master"],
}

OPENINGS = [
    "Once upon a time there was a {trait} {kind} named {name}. {He} lived {home}.",
    "Once upon a time, a {trait} {kind} named {name} lived {home}.",
    "Once upon a time, {home}, there lived a {trait} {kind}. {His} name was {name}.",
    "There was once a {trait} {kind} who lived {home}. {His} name was {name}.",
    "Long ago, {home}, there lived a {kind} called {name}. Everybody said that {he} was very {trait}.",
    "Long ago there lived a {trait} {kind} named {name}.",
    "{Home} lived a {trait} {kind} whose name was {name}.",
    "{name} was a {trait} {kind} who lived {home}.",
    "{name} the {kind} lived {home}. {He} was {trait}, and {he} loved {food}.",
    "This is the story of {name}, a {trait} {kind} who lived {home}.",
    "Far away from here, {home}, lived {name}, a {trait} {kind}.",
    "Many years ago a {trait} {kind} came to live {home}. The people called {him} {name}.",
    "Do you know {name}? {He} is a {trait} {kind} who lives {home}. This is what happened to {him}.",
]
# Stories that begin in the middle, so that a prompt such as "The robot opened the door and" goes on well.
SUDDEN = [
    "The {kind} opened the door and {saw}. {His} name was {name}, and {he} lived {home}.",
    "The {trait} {kind} opened the door and {saw}. It was {name}, who lived {home}.",
    "The {kind} looked out of the window and {saw}. \"What a strange day,\" said {name}, for that was {his} name.",
    "The {kind} climbed the hill and {saw}. {His} name was {name}, and {he} came from far away.",
    "The {kind} woke up and {saw}. \"I must get up,\" said {name}, who was a very {trait} {kind}.",
    "The {kind} walked along the road and {saw}. {His} name was {name}, and {he} lived {home}.",
    "When {name} the {kind} opened {his} eyes, {he} {saw}.",
    "\"Is anybody there?\" asked {name} the {kind}. {He} opened the door and {saw}.",
    "{name} opened the window and {saw}. {He} was a {trait} {kind} who lived {home}.",
]
SAW = ["looked at the rain", "saw a bird in the snow", "saw that the sun was shining", "heard a strange noise",
       "found a letter on the step", "smelled fresh bread", "saw smoke over the hill",
       "saw tracks in the mud", "stepped into the garden", "saw a light far away", "heard somebody sing",
       "walked into the cold night", "saw that the street was empty", "felt the warm wind"]

MEET = [
    "There {he} met {friend}, a {ftrait} {fkind}.",
    "On the way {he} met a {ftrait} {fkind} named {friend}.",
    "Then a {ftrait} {fkind} came along. It was {friend}.",
    "Just then a {fkind} called {friend} came by.",
]
ASK = [
    "\"What is the matter?\" asked {friend}.",
    "\"Why do you look so sad?\" asked {friend}.",
    "\"Can I help you?\" asked {friend} with a smile.",
    "\"You look tired,\" said {friend}. \"What happened?\"",
    "\"Good day,\" said {friend}. \"Do you need some help?\"",
]
THANKS = [
    "\"Thank you, {friend},\" said {name}. \"I will never forget this.\"",
    "{name} thanked {friend} again and again.",
    "\"How can I thank you?\" asked {name}. \"By being my friend,\" said {friend}.",
    "{name} was so happy that {he} danced. \"You are a true friend,\" {he} said.",
    "{name} laughed and shook hands with {friend}.",
]
ENDINGS = [
    "From that day on, {name} and {friend} were the best of friends.",
    "And so they lived happily for many years.",
    "That evening they ate {food} together and told each other stories. The end.",
    "{name} went home and slept well that night. The end.",
    "Since then {name} has always known that {moral}.",
    "And {name} never forgot that {moral}.",
    "\"Now I know,\" said {name}, \"that {moral}.\"",
    "When the moon came up, {name} was still smiling. The end.",
    "They shared the {food}, and there was enough for everybody.",
    "If you go there today, you may still see {name} and {friend} sitting side by side.",
    "So {name} learned that {moral}. The end.",
    "And that is how {name} found a friend.",
]

PLOTS: dict[str, list[list[str]]] = {
    "lost thing": [
        ["{name} had a {thing} that {he} loved more than anything else.",
         "{His} dearest treasure was a {thing}.",
         "{He} owned only one precious thing, a {thing}.",
         "Every day {he} played with {his} {thing}."],
        ["{time}, the {thing} was gone.", "{time}, {he} could not find the {thing} anywhere.",
         "But {timel}, the {thing} had disappeared.", "{time}, somebody had taken the {thing}, or so it seemed."],
        ["{name} looked {spot} and {spot2}, but it was not there.",
         "{He} searched {spot}, then {spot2}, and found nothing but dust.",
         "\"Where can it be?\" cried {name}. {He} looked {spot}, but there was only an old shoe.",
         "{He} ran to {place} and asked everybody, but nobody had seen it."],
        MEET,
        ASK,
        ["\"I have lost my {thing},\" said {name}.", "{name} told {friend} about the {thing}.",
         "\"My {thing} is gone,\" said {name}, \"and I do not know where to look.\""],
        ["\"Let us think,\" said {friend}. \"Where did you have it last?\" {name} remembered {place}.",
         "\"I saw something shine near {place},\" said {friend}. They went there at once.",
         "\"Four eyes see more than two,\" said {friend}, and they walked to {place} together."],
        ["There it was, {spot3}, wet but not broken.", "And there, {spot3}, lay the {thing}.",
         "After a long search {friend} pulled the {thing} out of a hole.",
         "A bird had carried the {thing} into its nest. {friend} climbed up and brought it down."],
        THANKS,
    ],
    "building": [
        ["{name} wanted to build a {build}.", "{His} great wish was to build a {build}.",
         "For a long time {he} had dreamed of a {build}.", "\"I will build a {build},\" said {name} one day."],
        ["{He} collected wood and nails and worked all day.", "{He} drew a plan and began to work.",
         "{He} worked from morning until night.", "{He} carried boards from {place} until {his} arms hurt."],
        ["But the wind came and blew everything down.", "But on the third day it all fell apart.",
         "But the {build} was crooked, and one night it broke.", "But the rope was too short and the wood too weak."],
        ["{name} sat down and was sad.", "\"I will never finish it,\" said {name}.",
         "{name} was angry and threw away the hammer.", "{He} wanted to give up."],
        MEET,
        ["\"You build too fast,\" said {friend}. \"Start with a strong base.\"",
         "\"Do not give up,\" said {friend}. \"I will hold the wood while you use the hammer.\"",
         "\"Make it smaller and stronger,\" said {friend}.",
         "\"I have good tools,\" said {friend}. \"Let us try again together.\""],
        ["So they began again, slowly this time.", "They worked side by side and sang.",
         "Piece by piece, the {build} grew.", "They measured twice and cut once."],
        ["After a week the {build} was ready, and it was beautiful.",
         "At last the {build} stood firm, even in the wind.",
         "When it was done, everybody came to look at the {build}.",
         "In the end it was the best {build} for miles around."],
        THANKS,
    ],
    "fear": [
        ["But {name} had a secret. {He} was afraid of {fear}.", "There was only one problem: {name} feared {fear}.",
         "{name} was afraid of {fear}, and {he} told nobody."],
        ["{time}, {he} heard a cry from {place}.", "{time}, somebody was lost near {place}.",
         "{time}, somebody called for help near {place}."],
        ["It was {friend}, a {ftrait} {fkind}. \"I am stuck,\" {fhe} called.",
         "{friend} the {fkind} had fallen into a hole and could not get out.",
         "A {fkind} named {friend} was sitting there, and {fhis} foot was caught between two stones."],
        ["{name} trembled. {He} thought of {fear} and wanted to run home.",
         "{His} heart was beating fast. \"I cannot go there,\" {he} thought.",
         "{name} stood still for a moment, because {he} could think only of {fear}."],
        ["But then {he} took a deep breath and went on.", "Then {he} counted to ten and ran as fast as {he} could.",
         "\"If I do not help, who will?\" {he} said, and {he} went."],
        ["{He} took a long branch and pulled {friend} out.", "{He} pulled and pulled until {friend} was free.",
         "{He} found a rope, threw it to {friend}, and pulled with all {his} strength."],
        ["\"You are the bravest {kind} I know,\" said {friend}.", "\"Were you not afraid?\" asked {friend}. "
         "\"I was,\" said {name}, \"but you needed me.\"",
         "\"You came!\" said {friend}. \"Nobody else did.\""],
        ["After that, {fear} did not seem so terrible any more.",
         "{name} noticed that {he} had not thought of {fear} for a whole hour.",
         "On the way home {name} was not afraid at all."],
    ],
    "stranger": [
        ["{time}, there was a knock at the door.", "{time}, a stranger came to the door.",
         "{time}, somebody called from the garden."],
        ["It was {friend}, a {ftrait} {fkind}, who was wet and cold.",
         "Outside stood a {fkind} named {friend}. {FHe} was tired and hungry.",
         "A {fkind} stood there. \"My name is {friend},\" {fhe} said, \"and I have lost my way.\""],
        ["{name} had only a little {food} left, but {he} shared it.",
         "\"Come in,\" said {name}, and {he} put {food} on the table.",
         "{name} did not ask many questions. {He} made a fire and brought {food}."],
        ["{friend} stayed for the night and left early in the morning.",
         "They talked until late, and in the morning {friend} went on.",
         "The next day {friend} was gone, but there was a {thing} on the table."],
        ["Months later, {name} was in trouble. A storm had broken the roof.",
         "Winter came, and {name} had nothing left to eat.",
         "Some weeks later, {name} got lost near {place}, and night was falling."],
        ["Suddenly {he} heard a voice that {he} knew. It was {friend}.",
         "Then {friend} came down the road with a full cart.",
         "Then a light came closer. It was {friend} with a lantern."],
        ["\"You helped me,\" said {friend}. \"Now it is my turn.\"",
         "\"I have not forgotten you,\" said {friend}.",
         "\"Once you shared your {food} with me,\" said {friend}. \"Today I share mine with you.\""],
        ["Together they put everything right.", "With two of them, the work was soon done.",
         "Before long, all was well again."],
    ],
    "race": [
        ["{name} wanted to win the great race to {place}.", "Every year there was a race to {place}.",
         "{time}, all the neighbours met for a race to {place}."],
        ["{friend} the {fkind} was the fastest of them all, and {fhe} laughed at {name}.",
         "\"You will never win,\" said {friend}, a proud {fkind}.",
         "Against {him} ran {friend}, a very quick {fkind}."],
        ["{name} trained every morning before the sun came up.",
         "{name} said nothing and tied {his} shoes.", "\"We shall see,\" said {name}."],
        ["The race began. {friend} ran ahead like the wind.", "A bell rang, and off they went. {friend} was soon far ahead.",
         "At first {friend} was in front, and {name} was last."],
        ["But in the middle of the way {friend} stopped to eat {food}.",
         "But {friend} was so sure of winning that {fhe} lay down and slept.",
         "But near the bridge {friend} slipped and hurt {fhis} leg."],
        ["{name} could have run past. Instead {he} stopped. \"Come, lean on me,\" {he} said.",
         "{name} came along, step by step. \"Get up, {friend},\" {he} said, \"or you will miss the end.\"",
         "{name} stopped and held out {his} hand to {friend}."],
        ["They crossed the line together, and everybody cheered.",
         "So they came to {place} at the same time, and both of them won.",
         "They walked the last part side by side, and the people clapped."],
        ["\"I was wrong about you,\" said {friend}.", "\"You are better than fast,\" said {friend}. \"You are kind.\"",
         "The prize was a {thing}, and they shared it."],
    ],
    "noise": [
        ["{time}, {name} heard a strange noise.", "{time}, {name} was woken by a noise.",
         "{time}, there was a noise {spot}."],
        ["It went tap, tap, tap, and then it was quiet.", "It sounded like somebody who was crying.",
         "Bump, bump, it went, and then again, bump."],
        ["\"Who is there?\" called {name}. There was no answer.", "{name} pulled the blanket over {his} head.",
         "{name} held {his} breath and listened."],
        ["{He} took a lamp and went to look {spot}. Nothing.",
         "Slowly {he} got up and looked {spot2}. There was nothing.",
         "First {he} looked {spot}, then {he} looked {spot2}."],
        ["Then {he} looked {spot3} and began to laugh.", "At last {he} found it, {spot3}.",
         "Then something moved {spot3}. {name} came closer with the lamp."],
        ["There sat {friend}, a {ftrait} {fkind}, who was looking for {food}.",
         "It was only {friend}, a little {fkind}, who could not sleep.",
         "A {fkind} named {friend} had come in from the cold and did not know how to get out."],
        ["\"I am sorry,\" said {friend}. \"I did not want to frighten you.\"",
         "\"I thought you were a ghost,\" said {name}. \"And I thought you were one,\" said {friend}.",
         "\"Please do not be angry,\" said {friend}."],
        ["\"Stay here,\" said {name}. \"There is room for two.\"", "{name} gave {friend} {food} and a warm place by the fire.",
         "They sat down together and ate {food} until the sun came up."],
    ],
    "wish": [
        ["{name} had one great wish. {He} wanted to see {wish}.", "More than anything, {name} wanted to see {wish}.",
         "Every night {he} dreamed of {wish}."],
        ["\"That is much too far,\" said the others.", "Everybody laughed at {him} and told {him} to stay at home.",
         "\"You are not made for such a journey,\" said the neighbours."],
        ["{time}, {name} packed {food} and a {thing} and set out.", "{time}, {he} closed the door and began to walk.",
         "{time}, {name} said goodbye and left."],
        ["{He} walked for three days and crossed a wide river.", "The road was long, and it rained without end.",
         "{He} climbed over stones and slept under trees."],
        MEET,
        ["\"I know the way,\" said {friend}. \"Come with me.\"",
         "\"I have always wanted to see that too,\" said {friend}. So they went on together.",
         "{friend} shared a blanket with {him} and showed {him} the path."],
        ["When they had almost given up, they saw it at last: {wish}.",
         "On the seventh day they stood on top of a hill, and before them lay {wish}.",
         "And then, behind the last trees, they found what they were looking for: {wish}."],
        ["For a long time neither of them said a word.", "{name} cried a little, because it was so beautiful.",
         "\"It is even better than in my dreams,\" said {name}."],
    ],
    "trick": [
        ["{friend}, a greedy {fkind}, lived next door. {FHe} always took {food} from the others.",
         "Not far away lived a greedy {fkind} named {friend}, who never shared anything.",
         "{His} neighbour {friend} was a {fkind} who wanted everything for {fhim}self."],
        ["{time}, {friend} said, \"Give me your {food}, or I will break your door.\"",
         "{time}, {friend} took the last of the {food}.", "{time}, {friend} came and wanted all the {food}."],
        ["{name} was not strong, but {he} could think.", "{name} thought for a while and smiled.",
         "\"Very well,\" said {name}, who had an idea."],
        ["\"There is a much bigger pile of {food} in {place},\" {he} said, \"but only for those who bring a gift.\"",
         "\"Did you know,\" {he} said, \"that a great treasure lies in {place}? It belongs to the one who shares.\"",
         "\"Take it,\" {he} said, \"but whoever eats it alone will dream of hungry wolves.\""],
        ["{friend} did not know what to believe. All night {fhe} could not sleep.",
         "{friend} thought about it all day long.", "At first {friend} only laughed. But then {fhe} began to wonder."],
        ["The next morning {friend} came back with a full basket.",
         "In the end {friend} brought a basket of {food} and put it on the table.",
         "After three days {friend} knocked softly and held out a basket."],
        ["They ate together, and {friend} noticed that it tasted better than alone.",
         "\"Strange,\" said {friend}. \"When I share, I am happier.\"",
         "\"So this is the treasure,\" said {friend}, and {fhe} had to laugh."],
    ],
    "storm": [
        ["{time}, black clouds came up over {place}.", "{time}, a great storm began.",
         "{time}, it rained so hard that the river rose."],
        ["The wind tore at the trees, and the water came higher and higher.",
         "Thunder rolled, and nobody dared to go outside.", "Soon the road was under water."],
        ["{name} remembered {friend}, the {fkind} who lived alone near {place}.",
         "\"What about {friend}?\" thought {name}. {friend} was an old {fkind} and could not walk well.",
         "Then {he} heard somebody call. It was {friend}, a {ftrait} {fkind}, who sat on a roof."],
        ["{He} jumped into a small boat and rowed through the waves.",
         "{He} tied a rope around {his} waist and went into the storm.",
         "{He} took a lantern and ran through the rain."],
        ["\"Hold on!\" cried {name}. \"I am coming!\"", "\"Give me your hand!\" called {name}.",
         "The lantern went out, but {name} did not turn back."],
        ["At the last moment {he} reached {friend} and brought {fhim} to safety.",
         "{He} carried {friend} home on {his} back.", "Wet and tired, they reached the house at midnight."],
        ["In the morning the sun was shining, and everything was calm.",
         "When the storm was over, they drank hot tea by the fire.",
         "The next day all the neighbours helped to clean up."],
        ["\"You saved me,\" said {friend}. \"I will give you my {thing}.\"",
         "{friend} gave {name} a {thing} and said, \"This is for you.\"", *THANKS[:2]],
    ],
    "seed": [
        ["{time}, {name} found a strange seed {spot}.", "{time}, the wind blew a small black seed to {name}."],
        ["{He} put it in the earth and gave it water.", "\"Let us see what you will be,\" {he} said, and {he} planted it {spot2}."],
        ["{He} waited one week, and two weeks, and nothing happened.", "Every day {he} looked, but the earth stayed bare."],
        ["\"Dig it up,\" said {friend}, a {ftrait} {fkind}. \"It is dead.\"",
         "{friend} the {fkind} laughed. \"You are watering a stone,\" {fhe} said."],
        ["But {name} went on and sang to the seed every evening.", "\"I can wait,\" said {name}, and {he} brought more water."],
        ["Then, after a warm night, there was a green leaf.", "One day a tiny green point looked out of the earth."],
        ["It grew and grew, until it was a tree as high as the house.", "By summer it was a tree, and it was full of {fruit}."],
        ["\"I was too quick,\" said {friend}. \"May I sit in its shade?\" \"Of course,\" said {name}.",
         "{friend} came back and looked up. \"Will you teach me to wait?\" {fhe} asked."],
    ],
    "birthday": [
        ["It was {name}'s birthday, but nobody seemed to know.", "{time}, {name} woke up and smiled, for it was {his} birthday."],
        ["{He} put {food} on the table and waited.", "{He} washed the cups and cleaned the house."],
        ["Nobody came. The clock struck three, and then four.", "The hours went by, and no one knocked."],
        ["Sadly {name} went for a walk to {place}.", "\"They have forgotten me,\" said {name}, and {he} went out alone."],
        MEET,
        ["\"Come quickly,\" said {friend}. \"I need your help at home.\"",
         "\"I have something heavy to carry,\" said {friend}. \"Will you help me?\" {name} said yes at once."],
        ["When {friend} opened the door, all the neighbours were there and sang.",
         "Behind the door there were lamps and flowers, and everybody shouted, \"Happy birthday!\""],
        ["There was a gift too. It was a {thing}.", "{friend} gave {him} a {thing}, and everybody ate {food}."],
        ["\"And I thought you had forgotten,\" said {name}.", "{name} laughed and cried at the same time."],
    ],
    "song": [
        ["{name} loved to sing, but {his} voice was rough.", "{name} wanted to sing in the choir, but {he} was always too loud."],
        ["\"Please stop,\" said the others. \"You hurt our ears.\"", "When {he} began, the birds flew away."],
        ["So {name} sang only where nobody could hear {him}, near {place}.", "So {he} went to {place} and sang to the stones."],
        ["{time}, a thick fog came down, and {friend} the {fkind} lost the way.",
         "{time}, {friend}, a {ftrait} {fkind}, got lost in the fog."],
        ["{FHe} could not see {fhis} own feet. \"Help!\" {fhe} called.", "{FHe} was close to the edge of the rocks and did not know it."],
        ["Then {fhe} heard a song, rough and loud, and walked towards it.",
         "{name} heard the call and sang as loudly as {he} could."],
        ["Step by step, the song led {friend} out of the fog.", "The voice went through the fog like a bell, and soon {friend} was safe."],
        ["\"What a wonderful voice,\" said {friend}.", "\"I have never heard a better song,\" said {friend}."],
        ["Since then {name} has sung every time the fog comes down.", "Now the others ask {him} to sing, at least when there is fog."],
    ],
    "letter": [
        ["{time}, {name} found a letter {spot}.", "{time}, a letter lay on {name}'s table."],
        ["It was from {friend}, a {fkind} who had once been {his} friend.",
         "On it was a name that {he} had not heard for years: {friend} the {fkind}."],
        ["They had quarrelled about a {thing} and had not spoken since.", "Long ago they had had an argument, and neither of them remembered why."],
        ["\"I am sorry,\" the letter said. \"I miss our talks.\"", "\"Can we be friends again?\" said the letter. \"I am too shy to knock.\""],
        ["{name} read it three times. Then {he} put on {his} coat.", "{name} did not answer the letter. {He} took {food} and went out."],
        ["{He} walked past {place} and did not stop once.", "It was a long way, past {place}, and it was getting dark."],
        ["When {friend} opened the door, neither of them could speak.", "{friend} was sitting by the window and could not believe {fhis} eyes."],
        ["\"I brought {food},\" said {name} at last. \"Then I will make tea,\" said {friend}.",
         "\"You came all this way,\" said {friend}. \"I should have come sooner,\" said {name}."],
    ],
    "star": [
        ["{time}, a small star fell from the sky and landed {spot}.", "{time}, {name} saw something bright {spot}. It was a little star."],
        ["\"I am cold,\" said the star.", "\"I fell,\" said the star softly. \"I was dancing too close to the edge.\""],
        ["{name} put it in a lantern and gave it a place by the fire.", "{name} carried it home in {his} hat."],
        ["All night the house was full of light, and {name} was happy.", "It was so bright that {he} could read without a lamp."],
        ["But every day the star grew paler.", "But the star became sad and looked out of the window."],
        ["\"It wants to go home,\" said {friend}, a {ftrait} {fkind}.", "{name} asked {friend}, a wise {fkind}. \"A star needs the sky,\" {fhe} said."],
        ["So they climbed the highest hill, and {name} held the star up.", "Together they built a long ladder and climbed up to the roof."],
        ["The wind took the star, and it flew up and up.", "The star gave {him} one last warm look and rose into the night."],
        ["Now there is one star that shines more brightly above {name}'s house.", "Each evening {name} waves, and the star blinks back."],
    ],
    "teacher": [
        ["{name} wanted to learn how to {skill}.", "Nobody had ever taught {name} how to {skill}."],
        ["{He} tried it alone, and it went wrong.", "{His} first try ended in the mud."],
        ["In {place} lived {friend}, an old {fkind} who could {skill} better than anybody.",
         "People said that {friend}, a {fkind} near {place}, was a master."],
        ["\"Please teach me,\" said {name}.", "{name} brought {food} and asked for a lesson."],
        ["\"First you must fail a hundred times,\" said {friend}. \"Come back then.\"",
         "\"I will teach you,\" said {friend}, \"if you count your mistakes.\""],
        ["{name} practised every day and counted. Ten, twenty, fifty.", "So {he} tried and failed, and tried again."],
        ["At ninety nine, {he} suddenly noticed that it worked.", "After a month {he} could not find any more mistakes to count."],
        ["\"I have only ninety nine,\" {he} told {friend}. \"Then you are ready,\" said {friend} and laughed.",
         "\"You see,\" said {friend}, \"you did not need me. You needed your mistakes.\""],
    ],
    # Four stories that are paging in disguise.
    "library": [
        ["{name} worked in a library where every long story was cut into small books.",
         "{name} looked after a library with a hundred small shelves."],
        ["In the old days, each writer had kept a whole wall of shelves, and most of them stayed empty.",
         "Before, every guest had got a whole room of shelves, and there was never enough space."],
        ["So {name} gave out one shelf at a time and wrote its number on a card.",
         "Then {name} had an idea. {He} gave each story one shelf after another, only when it was needed, "
         "and wrote the numbers on a card."],
        ["{time}, {friend} the {fkind} came in. \"My story is all over the place!\" {fhe} cried.",
         "{time}, a {fkind} named {friend} asked for the longest story of all.",
         "{time}, {friend}, a {ftrait} {fkind}, wanted to write a new story, but the library seemed full."],
        ["\"Look at the card,\" said {name}. \"It says shelf nine, then shelf two, then shelf seven.\"",
         "{name} took the card. \"Shelf four, shelf eleven, shelf three,\" {he} read. \"Just follow the numbers.\""],
        ["{friend} followed the card, and the story was complete from the first word to the last.",
         "{friend} went from shelf to shelf, and not one page was missing."],
        ["\"The shelves need not stand side by side,\" said {name}, \"as long as the card is right.\"",
         "\"What a clever card,\" said {friend}. \"No shelf is wasted.\""],
    ],
    "hotel": [
        ["{name} had a hotel with only {n} rooms.", "{name} ran a little hotel with {n} rooms."],
        ["{time}, all the rooms were full.", "{time}, every room was taken, and nobody wanted to leave."],
        ["Then {friend}, a {ftrait} {fkind}, came back. {FHe} had been waiting the longest.",
         "Then an important letter came: {friend} the {fkind} needed one more room for {fhis} family."],
        ["{name} went to the guest who had come last. \"Please pack your bags,\" {he} said, \"but do not be sad. "
         "You will get a room again.\"",
         "\"The last one to come must wait in the hall,\" said {name}. \"That is the rule, and it is fair.\""],
        ["The guest wrote everything down in a notebook and sat in the hall.",
         "The guest grumbled, but the chairs in the hall were soft and there was {food}."],
        ["Before long a family went home, and some rooms were free again.",
         "Soon the first guests left, and the keys came back to the hook."],
        ["The guest got a new room, put everything back in its place, and went on as if nothing had happened.",
         "\"Welcome back,\" said {name}, and the guest was content."],
    ],
    "lockers": [
        ["{name} looked after the lockers at the station.", "At the station {name} had a wall of small lockers."],
        ["Every traveller got a card with the numbers of the lockers.",
         "Whoever came with bags got as many lockers as the bags needed, and a card with the numbers."],
        ["{time}, {friend}, a {ftrait} {fkind}, came with a very long train of bags.",
         "{time}, a {fkind} named {friend} brought so many bags that everybody stared."],
        ["\"There is no long row of free lockers,\" said {friend} sadly.",
         "\"You have no place that is large enough,\" said {friend}."],
        ["\"You do not need a long row,\" said {name}. \"I have one here, one there, and three at the end.\"",
         "{name} smiled. \"Many small places are as good as one large place,\" {he} said, and {he} wrote a card."],
        ["When {friend} came back, {fhe} read the card and found every bag.",
         "In the evening {friend} opened the lockers one after another, and all the bags were there."],
        ["The lockers were free again, and the next traveller was already waiting.",
         "{name} hung the keys on the hook, ready for the next guest."],
    ],
    "recipe": [
        ["{name} had the best recipe for {dish} in the whole land.",
         "{name} had an old book with a recipe for {dish}."],
        ["{friend}, a {ftrait} {fkind}, loved it too, so they shared one book.",
         "{friend} the {fkind} was allowed to read the same book, and nobody needed a second one."],
        ["{time}, {friend} wanted to add more sugar.", "{time}, {friend} wanted to change the last page."],
        ["\"Stop!\" said {name}. \"If you write in the book, my recipe will change too.\"",
         "\"Wait,\" said {name}. \"We both read this page. You cannot just write on it.\""],
        ["They thought about it. \"I will copy only this one page,\" said {friend}.",
         "\"Then let us copy this page,\" said {friend}, \"and leave the rest as it is.\""],
        ["So they shared all the other pages, and each of them had one page alone.",
         "It was quickly done, because only one page had to be copied."],
        ["In the evening there were two kinds of {dish} on the table, and both were good.",
         "They made two kinds of {dish} and could not say which was better."],
    ],
}
WISHES = ["the sea", "the high mountains", "the northern lights", "the city of a thousand lamps",
          "the largest tree in the world", "the end of the rainbow", "the flying islands", "the snow",
          "the great waterfall", "the valley of butterflies"]

FRUITS = ["apples", "pears", "plums", "cherries", "golden nuts"]
SKILLS = ["swim", "sing", "paint", "bake bread", "ride a horse", "play the flute", "dance", "sail", "juggle"]

# What a plot can be called in a request.
TOPICS = {
    "lost thing": "a lost {thing}", "building": "building a {build}", "fear": "being brave",
    "stranger": "a stranger at the door", "race": "a race", "noise": "a strange noise",
    "wish": "a long journey", "trick": "a greedy neighbour", "storm": "a storm", "library": "a library",
    "hotel": "a hotel", "lockers": "lockers", "recipe": "a recipe", "seed": "a seed",
    "birthday": "a birthday", "song": "a song", "letter": "a letter", "star": "a star",
    "teacher": "learning to {skill}",
}
TITLE_ASKS = [
    "Tell me a story about {topic}.", "Write a story about {topic}.", "A story about {topic}, please.",
    "Tell me a story about {a_kind} and {topic}.", "I want a story about {topic}.",
    "Tell me a story about {a_kind}.", "Tell me a story about {a_kind} named {name}.",
    "Can you tell me a story about {a_kind}?", "Write a short story about {a_kind}.",
    "I would like a story about {a_kind}, please.", "Please tell me a story about {a_kind}.",
    "Do you know a story about {a_kind}?", "Make up a story about {a_kind}.",
    "A story about {a_kind} and {a_fkind}, please.", "Tell me a story about {name} the {kind}.",
    "Tell me a story.", "Tell me a short story.", "Can you tell me a story?", "I want to hear a story.",
    "Write a story with {a_kind} and {a_fkind}.", "Tell my child a story about {a_kind}.",
]


def article(noun: str) -> str:
    """'fox' -> 'a fox', 'owl' -> 'an owl'."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _character(rng: random.Random, kind: str | None = None) -> tuple[str, str, str]:
    """A (kind, name, pronoun) that go together."""
    if kind is None:
        kind = rng.choice(rng.choice([ANIMALS, ANIMALS, PEOPLE_HE, PEOPLE_SHE, WONDERS]))
    sides = [p for p, only in (("he", [*PEOPLE_HE, "snowman", "wizard"]), ("she", [*PEOPLE_SHE, "hen", "cow"])) if kind in only] or ["he", "she"]
    pronoun = rng.choice(sides)
    return kind, rng.choice(NAMES[pronoun]), pronoun


class Story(NamedTuple):
    """A story, a request that it answers, and who it is about."""

    request: str
    text: str
    about: str


def story(rng: random.Random) -> Story:
    """Invent one story."""
    plot = rng.choice(list(PLOTS))
    kind, name, pronoun = _character(rng)
    fkind, friend, fpronoun = _character(rng)
    while friend == name or fkind == kind:
        fkind, friend, fpronoun = _character(rng)
    he, him, his = PRONOUNS[pronoun]
    fhe, fhim, fhis = PRONOUNS[fpronoun]
    spot, spot2, spot3 = rng.sample(SPOTS, 3)
    # "Old" is a trait already: "a young old man" would be odd.
    trait, ftrait = ("kind" if k.startswith("old") else t for k, t in zip((kind, fkind), rng.sample(TRAITS, 2), strict=True))
    time, home = rng.choice(TIMES), rng.choice(HOMES)
    slots = dict(
        kind=kind, name=name, he=he, him=him, his=his, He=he.capitalize(), His=his.capitalize(), trait=trait,
        fkind=fkind, friend=friend, fhe=fhe, fhim=fhim, fhis=fhis, FHe=fhe.capitalize(), ftrait=ftrait,
        time=time, timel=time[0].lower() + time[1:], home=home, Home=home[0].upper() + home[1:],
        place=rng.choice(PLACES), thing=rng.choice(THINGS), food=rng.choice(FOODS), dish=rng.choice(DISHES),
        spot=spot, spot2=spot2, spot3=spot3, build=rng.choice(BUILDS), fear=rng.choice(FEARS),
        wish=rng.choice(WISHES), fruit=rng.choice(FRUITS), skill=rng.choice(SKILLS), saw=rng.choice(SAW),
        moral=rng.choice(MORALS[plot]), n=rng.choice("four five six seven eight nine ten".split()),
        a_kind=article(kind), a_fkind=article(fkind),
    )
    slots["topic"] = TOPICS[plot].format_map(slots)
    opening = SUDDEN if rng.random() < 0.3 else OPENINGS
    sentences = [rng.choice(wordings) for wordings in [opening, *PLOTS[plot], ENDINGS]]
    # A paragraph break or two makes the page easier to read.
    breaks = {1, len(sentences) - 2} if rng.random() < 0.4 else set()
    text = "".join(("" if i == 0 else "\n" if i in breaks else " ") + s for i, s in enumerate(sentences))
    text = _fix_articles(text.format_map(slots))
    return Story(rng.choice(TITLE_ASKS).format_map(slots), text, f"{name}, {article(kind)}")


def _fix_articles(text: str) -> str:
    """'a owl' -> 'an owl'."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
